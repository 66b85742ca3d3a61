#!/usr/bin/env bash
# From `git clone` to a moving world, as a newcomer does it: the README's commands in a fresh folder,
# and the seconds of each part.
#
#   benchmarks/first_hour.sh [REPOSITORY]    what is cloned; this checkout's newest commit if left out
#
# The page is played by a client that asks for the first frames as the browser does, since a machine
# may have none; benchmarks/browser.py times the same with Chromium. Packages come from pip's cache
# where it has them: the first run on a machine downloads them.
set -euo pipefail
repository=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
folder=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH VIRTUAL_ENV

began=$(date +%s.%N) last=$began
part() {
    local now
    now=$(date +%s.%N)
    printf '%-44s %6.1f s\n' "$1" "$(awk "BEGIN { print $now - $last }")"
    last=$now
}

git clone --quiet "$repository" scd
cd scd
part "git clone"
python3 -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
part "python3 -m venv .venv"
install=$(.ci/run --show | sed -n '1s/ && scd demo$//p')
eval "$install --quiet"
part "$install"
scd demo >/dev/null 2>&1
part "scd demo"
scd play --no-browser --port 0 >played.txt 2>&1 &
server=$!
python - <<'PYTHON'
import re
import time
from pathlib import Path

from scd.serving.client import Client

deadline = time.monotonic() + 120
while not (found := re.search(r"http://\S+", Path("played.txt").read_text())):
    assert time.monotonic() < deadline, Path("played.txt").read_text()
    time.sleep(0.02)
with Client(found[0]) as client:
    client.create(start="clip", clip=0)
    first = client.step(action=1)[0].pixels
    assert (client.step(action=1)[0].pixels != first).any(), "nothing moves"
PYTHON
part "scd play, to the second frame"
last=$began
part "all"
