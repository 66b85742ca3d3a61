#!/usr/bin/env bash
# tyro 1.0.16: the completion script for bash offers the second line of a help text as a candidate.
#
# Guessed: one candidate for each flag, whatever its help text looks like.
# Seen: a docstring of two lines below a field gives two candidates for one flag. The script's
# Python part prints a flag, a tab and the help text, and bash splits what was printed at newlines.
#
# Output when this was written (tyro 1.0.16, Python 3.11, bash 5.2):
#     [--rate]
#     [second line of the help. (default: 1)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tyro==1.0.16

cat > "$folder/program.py" <<'PYTHON'
from dataclasses import dataclass

import tyro


@dataclass
class Settings:
    rate: int = 1
    """First line of the help,
    second line of the help."""


tyro.cli(Settings, prog="program")
PYTHON

"$folder/venv/bin/python" "$folder/program.py" --tyro-print-completion bash > "$folder/script"
seen=$(FOLDER=$folder bash -c '
    source "$FOLDER/script"
    COMP_WORDS=(program --ra) COMP_CWORD=1
    _tyro_program
    printf "[%s]\n" "${COMPREPLY[@]}"
')
echo "$seen"
expected=$'[--rate]\n[second line of the help. (default: 1)]'
if [[ $seen != "$expected" ]]; then
    echo "tyro behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
