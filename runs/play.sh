#!/usr/bin/env bash
# The world that comes with the package, from nothing: recording, two and a half hours of training on
# one CPU core, students of few steps measured against it, and the folders in scd/worlds.
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
# In two parts, since that is how it came to be: the rate rose and fell twice.
run scd train doom-play --data "$data" --out "$out/first" --precision fp32 --max-steps 2800
run scd train doom-play --data "$data" --out "$out/teacher" --initial "$out/first" --max-steps 7000
ON_CLIPS=250 ON_ROLLOUTS=150 CLIPS=128 BESIDE="" run bash runs/few_steps.sh "$out/students" \
  "$out/teacher" "$data" few_steps_doom
# What is played, and the world of many steps that it was distilled from.
[ -d "$out/shipped" ] ||
  run python examples/ship_world.py "$out/students/runs/dmd-4" --data "$data" --out "$out/shipped"
[ -d "$out/shipped-teacher" ] ||
  run python examples/ship_world.py "$out/teacher" --data "$data" --out "$out/shipped-teacher"
cp "$out"/shipped/* scd/worlds/doom/
cp "$out"/shipped-teacher/* scd/worlds/doom-teacher/
