#!/usr/bin/env bash
# The tables "few steps" and "drift" of docs/results.md: a teacher at 50, 10, 4, 2 and 1 steps, and
# its students at 4, 2 and 1, all measured on the same clips and timed in turns. For the toy world
# about an hour on one idle CPU core. Stop it at any time and start it again: what is done stays.
#
#   runs/few_steps.sh [FOLDER] [TEACHER] [DATA] [NAME] [FLAGS OF scd distill ...]
#
# Doom: runs/few_steps.sh runs/out/few_steps/doom-32 runs/out/doom_cpu/doom-32 \
#         runs/out/doom_cpu/data-32 few_steps_doom-32
set -euo pipefail
cd "$(dirname "$0")/.."
# A signal to this script reaches the command that it waits for, which saves before it ends.
set -m
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run() { "$@" & wait "$!"; }
out=${1:-runs/out/few_steps/toy}
teacher=${2:-runs/out/demo/separable}
data=${3:-toy:32}
name=${4:-few_steps_toy}
flags=("${@:5}")
judge=$out/judge
mkdir -p "$out"

[ -d "$judge" ] || run scd train-judge --data "$data" --out "$judge"

# A student of consistency serves every number of steps; the others are of one.
run scd distill "$teacher" --data "$data" --method consistency --steps 4 \
  --out "$out/runs/consistency" "${flags[@]}"
for steps in 4 2 1; do
  run scd distill "$teacher" --data "$data" --method dmd --steps "$steps" \
    --initial "$out/runs/consistency" --out "$out/runs/dmd-$steps" "${flags[@]}"
done

worlds=()
# measure NAME RUN STEPS: over the training's length, over four times that, and for the turns below.
measure() {
  worlds+=("$1-$3=$2@$3")
  common=(--data "$data" --judge "$judge" --context 8 --batch-size 32 --num-steps "$3")
  [ -f "$out/$1-$3.json" ] ||
    run scd evaluate "$2" "${common[@]}" --horizon 8 --num-clips 256 \
      --out "$out/$1-$3.json"
  [ -f "$out/$1-$3-long.json" ] ||
    run scd evaluate "$2" "${common[@]}" --horizon 56 --num-clips 64 \
      --out "$out/$1-$3-long.json"
}
for steps in 50 10 4 2 1; do measure teacher "$teacher" "$steps"; done
for steps in 4 2 1; do measure consistency "$out/runs/consistency" "$steps"; done
for steps in 4 2 1; do measure dmd "$out/runs/dmd-$steps" "$steps"; done

[ -f "$out/turns.json" ] ||
  run python benchmarks/turns.py "${worlds[@]}" --data "$data" --out "$out/turns.json"
run python docs/few_steps.py "$name" "$out"
python docs/tables.py
