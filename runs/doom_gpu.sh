#!/usr/bin/env bash
# Doom 64x64 on one GPU, separable and dense: 25 minutes of training each.
# Stop it at any time and start it again: recording and training continue where they were.
#
#   runs/doom_gpu.sh [FOLDER] [SECONDS]    train at most SECONDS per model in this call
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/doom_gpu}
seconds=${2:-1500}
# 1,700 episodes of 300 frames are 510,000 frames.
run scd record doom --episodes 1700 --frames 300 --size 64 --seed 0 --out "$out/data"
wide="--batch-size 16 --num-frames 32 --max-steps 12000 --precision bf16
  --model.block.width 384 --save-every 250 --validate-every 1000 --sample-every 1000"
# shellcheck disable=SC2086
run scd train doom-64 --data "$out/data" --out "$out/separable" --time-limit-s "$seconds" $wide \
  --model.encoder.num-layers 8 --model.decoder.num-layers 4
# shellcheck disable=SC2086
run scd train doom-64-dense --data "$out/data" --out "$out/dense" --time-limit-s "$seconds" $wide \
  --model.num-layers 12
for model in separable dense; do
  python tools/curves.py "$out/$model" "doom-64-gpu-$model"
  run scd evaluate "$out/$model" --data "$out/data" --context 16 --horizon 16 \
    --out "docs/results/doom_64_gpu_$model.json"
  run scd sample "$out/$model" --data "$out/data" --context 16 --frames 48 --steps 10 \
    --out "$out/sample-$model"
done
python tools/tables.py
