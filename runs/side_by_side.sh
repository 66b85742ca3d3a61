#!/usr/bin/env bash
# Two checkouts of this project in turns, A B A B, on a CPU that does nothing else: A is the one that
# this script lies in, B the one that is named. Prints what each took, and the ratios A / B.
#
#   runs/side_by_side.sh BASE_CHECKOUT [FOLDER]   measurements go to FOLDER/side_by_side.txt
#   ROUNDS=1 FRAMES=10 STEPS=4 runs/side_by_side.sh BASE_CHECKOUT   all commands once, and brief
#   MEASURES="one_stream help_s" runs/side_by_side.sh BASE_CHECKOUT   some of the measurements
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
base=$(cd "${1:?another checkout of this project}" && pwd)
out=${2:-$here/runs/out/side_by_side}
rounds=${ROUNDS:-5} frames=${FRAMES:-200} steps=${STEPS:-40}
all="one_stream eight_sessions training_step serve_mib help_s train_help_s"
mkdir -p "$out"
found=$out/side_by_side.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUDA_VISIBLE_DEVICES=""

# in_checkout FOLDER WORDS...: python of a checkout, whatever version of scd is installed: both the
# folder that it runs in and PYTHONPATH come before installed packages.
in_checkout() {
  local checkout=$1
  shift
  cd "$checkout"
  PYTHONPATH=$checkout exec python "$@"
}
scd_of() { (in_checkout "$1" -m scd "${@:2}") >"$work/said" 2>&1 || { cat "$work/said" >&2; exit 1; }; }

# field FILE NAME: a number of a JSON object.
field() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$@"; }

# Each prints one number of a checkout.
one_stream() {
  scd_of "$1" sample --run "$1/scd/worlds/doom" --context 16 --frames "$frames" --device cpu \
    --out "$work/sample"
  field "$work/sample/sample.json" frames_per_second
}
eight_sessions() {
  scd_of "$1" bench --model "$1/scd/worlds/doom" --engine fast --sessions 8 --frames "$frames" \
    --device cpu --context 16 --json "$work/rows.json"
  field "$work/rows.json" frames_per_s_end_to_end
}
training_step() {
  rm -rf "$work/run"
  scd_of "$1" train toy --max-steps "$steps" --optim.warmup-steps 1 --log-every 1 \
    --validate-every 0 --sample-every 0 --save-every 0 --device cpu --out "$work/run"
  python - "$work/run/log.jsonl" <<'PROGRAM'
import json, sys
from statistics import median

rows = [json.loads(line) for line in open(sys.argv[1])]
seconds = [row["step_s"] for row in rows if row["event"] == "step"]
# The first steps also allocate.
print(median(seconds[len(seconds) // 4 :]))
PROGRAM
}
serve_mib() {
  : >"$work/served"
  (in_checkout "$1" -m scd serve --port 0 --device cpu) >"$work/served" 2>&1 &
  local server=$!
  # In the subshell that this runs in.
  # shellcheck disable=SC2064
  trap "kill $server 2>/dev/null || true" EXIT
  until grep -q http:// "$work/served"; do
    kill -0 "$server" || { cat "$work/served" >&2; exit 1; }
    sleep 0.2
  done
  sleep 2
  awk '/^VmRSS/ { print $2 / 1024 }' "/proc/$server/status"
  kill "$server"
  wait "$server" || true
}
cpu_s() {
  TIMEFORMAT="%U %S"
  { time scd_of "$@"; } 2>&1 | awk '{ print $1 + $2 }'
}
help_s() { cpu_s "$1" --help; }
train_help_s() { cpu_s "$1" train --help; }

for checkout in "$here" "$base"; do
  (in_checkout "$checkout" -c 'import scd, sys; print(scd.__file__)') | grep -qF "$checkout/scd/"
  # Once for compiled files and the disk's cache.
  scd_of "$checkout" train --help
done
: >"$found"
for round in $(seq "$rounds"); do
  for side in A B; do
    [ "$side" = A ] && checkout=$here || checkout=$base
    for name in ${MEASURES:-$all}; do
      number=$("$name" "$checkout")
      echo "$round $side $name $number" | tee -a "$found"
    done
  done
done

python - "$found" <<'PROGRAM'
import sys
from statistics import median

rows = [line.split() for line in open(sys.argv[1])]
print(f"\n{'':16}{'A':>10}{'B':>10}  A/B, its smallest and its largest in a round")
for name in dict.fromkeys(row[2] for row in rows):
    a, b = ([float(row[3]) for row in rows if row[1:3] == [side, name]] for side in "AB")
    ratios = [one / two for one, two in zip(a, b, strict=True)]
    middle, low, high = median(ratios), min(ratios), max(ratios)
    print(f"{name:16}{median(a):10.4g}{median(b):10.4g}  {middle:.3f} [{low:.3f}, {high:.3f}]")
print("one_stream and eight_sessions in frames per second: more is better; seconds and MiB: less is")
PROGRAM
