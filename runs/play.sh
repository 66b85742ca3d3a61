#!/usr/bin/env bash
# The world that comes with the package, from nothing: recording, an hour and a half of training on
# one CPU core, students of few steps measured against it, and the folder in scd/worlds/doom.
# Stop it at any time and start it again: what is done stays.
#
#   runs/play.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
export OMP_NUM_THREADS=1
out=${1:-runs/out/play}
data=$out/data
run scd record doom --episodes 430 --frames 300 --size 64 --seed 0 --out "$data"
run scd train doom-play --data "$data" --out "$out/teacher" --precision fp32 --max-steps 2800
ON_CLIPS=250 ON_ROLLOUTS=150 run bash runs/few_steps.sh "$out/students" "$out/teacher" "$data" \
  few_steps_doom --precision fp32
[ -d "$out/shipped" ] ||
  run python examples/ship_world.py "$out/students/runs/dmd-4" --data "$data" --out "$out/shipped"
cp "$out"/shipped/* scd/worlds/doom/
