#!/usr/bin/env bash
# The table "How a frame is made" of docs/results.md: games, and ways of making a frame, each trained
# for the same processor time of one core, autoencoder included, and measured on the same clips.
# Stop it at any time and start it again: what is done stays.
#
#   runs/worlds/compare.sh [FOLDER]
#
# MINUTES in the environment is the time of each row, 8 unless it says otherwise; ROWS are some of its
# rows, as `cars/latents-16 crafter/pixels-16`, instead of all ten, which take about three hours of a
# core with their evaluations. QUICK=1 does a little of everything, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
source runs/start.sh
export OMP_NUM_THREADS=1 UNTIL=recording
out=${1:-runs/out/compare}
run bash runs/worlds/cars.sh "$out/cars"
run bash runs/worlds/crafter.sh "$out/crafter"
# Cars cross ten lanes, each at its own speed; the player goes up and down among them.
run scd record gym ALE/Freeway-v5 --make frameskip=1 repeat_action_probability=0.0 \
  --frames-from observation --crop 15 8 180 152 --size 64 --frame-skip 4 --warmup 5 200 \
  --policy runs/worlds/cross.py:cross --names nothing up down --episodes "$(amount 200 6)" \
  --frames 200 --val-fraction 0.02 --test-fraction 0.08 --out "$out/freeway/data"
# A maze of near, noisy walls, and a level with rooms that one looks through.
for scenario in my_way_home map01; do
  run scd record doom --scenario "$scenario" --episodes "$(amount 200 6)" --frames 200 --size 64 \
    --val-fraction 0.02 --test-fraction 0.08 --out "$out/doom-$scenario/data"
done
flags=(--minutes "$(amount "${MINUTES:-8}" 0.02)")
flags+=(--clips "$(amount 64 4)" --judge-steps "$(amount 300 4)")
if [ -n "${QUICK:-}" ]; then flags+=(--out "$out/equal_time.json"); fi
if [ -n "${ROWS:-}" ]; then
  read -ra rows <<<"$ROWS"
  flags+=(--rows "${rows[@]}")
fi
run python tools/equal_time.py "$out" "${flags[@]}"
