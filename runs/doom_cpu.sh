#!/usr/bin/env bash
# The tables "Doom on a CPU" of docs/results.md: over an hour per model on one CPU core each.
# Stop it at any time and start it again: recording and training continue where they were.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/doom_cpu}
for size in 32 64; do
  run scd record doom --episodes 430 --frames 300 --size "$size" --seed 0 --out "$out/data-$size"
done
OMP_NUM_THREADS=1 scd train doom-32 --data "$out/data-32" --out "$out/doom-32" --max-steps 4700 &
pid32=$!
OMP_NUM_THREADS=1 scd train doom-64 --data "$out/data-64" --out "$out/doom-64" --max-steps 2150 &
pid64=$!
wait "$pid32"
wait "$pid64"
for size in 32 64; do
  python tools/curves.py "$out/doom-$size" "doom-$size"
  run scd evaluate "$out/doom-$size" --data "$out/data-$size" --context 8 --horizon 8 \
    --out "docs/results/doom_${size}_cpu.json"
  run scd sample "$out/doom-$size" --data "$out/data-$size" --context 8 --frames 16 --steps 10 \
    --out "$out/sample-$size"
done
python tools/tables.py
