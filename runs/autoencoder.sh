#!/usr/bin/env bash
# An autoencoder of Doom, and the latents of the clips: on one GPU at 128x128 by FAR's network of
# cells of 16 pixels, with FAR's 200,000 steps; SMALL=1 in the environment: by a small network with
# the same cells, for a CPU (an hour on a busy core, encoding included).
# Stop it at any time and start it again: recording, training and encoding go on where they were.
#
#   [SMALL=1] runs/autoencoder.sh [FOLDER] [SECONDS] [DATA]
#
# SECONDS is how long to train in this call at most; 0: as long as it takes. How well held-out
# frames are reconstructed is then in FOLDER/autoencoder/held_out.json, pictures in samples/ there.
# ALEXNET in the environment, torchvision's file of weights, makes LPIPS the perceptual distance.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
seconds=${2:-0}
if [ -n "${SMALL:-}" ]; then
  export OMP_NUM_THREADS=1
  out=${1:-runs/out/autoencoder/small} episodes=200
  flags=(--network small-16 --reconstruction-steps 3000 --adversarial-steps 0 --batch-size 8
    --num-frames 1 --num-validation-clips 256 --validate-every 500 --save-every 500
    --optim.optimizer muon --optim.muon-lr 5e-3 --optim.lr 2e-3 --optim.warmup-steps 50
    --optim.decay-fraction 0.5 --ema-decay 0.99 --perceptual-weight 0.1 --device cpu
    --num-loader-workers 1)
else
  out=${1:-runs/out/autoencoder/doom-128} episodes=1000
  flags=(--network deep-16 --precision bf16 --batch-size 32 --num-frames 4 --num-loader-workers 12
    --num-validation-clips 256)
fi
data=${3:-$out/data}
[ -d "$data" ] && [ -n "${3:-}" ] ||
  run scd record doom --episodes "$episodes" --frames 300 --size 128 --val-fraction 0.1 --seed 0 \
    --out "$data"
run scd train-autoencoder --data "$data" --out "$out/autoencoder" "${flags[@]}" \
  --time-limit-s "$seconds" ${ALEXNET:+--alexnet "$ALEXNET"}
# Latents of an autoencoder that goes on learning would have to be written again.
if grep -q "all steps are done" "$out/autoencoder/log.jsonl"; then
  run scd encode "$data" --autoencoder "$out/autoencoder" --out "$out/latents"
fi
