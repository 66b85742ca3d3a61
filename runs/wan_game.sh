#!/usr/bin/env bash
# A tiny Wan-shaped world of a game, steered by keys and a prompt, on one core of a CPU: recorded
# cars, a small autoencoder of Wan's kind trained on them, a text encoder of random weights, teacher
# forcing; then a student of two steps, by a causal start and matching, and what both are worth. Stop
# it at any time and start it again: what is done stays.
#
#   runs/wan_game.sh [CARS] [FOLDER]    CARS: recordings of runs/worlds/cars.sh; results in FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
cars=${1:-data/cars}
out=${2:-runs/out/wan-game}
mkdir -p "$out"
cpu=(--device cpu --precision fp32 --threads 1 --num-loader-workers 1)

# One prompt for all: what steers this world is its keys.
for video in "$cars"/videos/*.mp4; do
  [ -e "${video%.mp4}.txt" ] || echo "a red car on the street" >"${video%.mp4}.txt"
done

run scd train-autoencoder --data "$cars" --network small-wan --num-frames 9 --batch-size 4 \
  --reconstruction-steps 400 --adversarial-steps 0 --perceptual-weight 0.3 --ema-decay 0.98 \
  --optim.optimizer muon --optim.muon-lr 5e-3 --optim.lr 2e-3 --optim.warmup-steps 20 \
  --optim.decay-fraction 0.4 --num-validation-clips 16 --validate-every 200 --save-every 50 \
  --log-every 20 "${cpu[@]}" --out "$out/seeing"
[ -e "$out/source/wan" ] || run python examples/random_wan.py "$out/source" --num-heads 4 \
  --head-dim 32 --ffn-dim 512 --num-layers 6 --text-dim 32 --vae "$out/seeing" --height 64 \
  --width 64 --num-frames 17
[ -d "$out/world" ] || run scd convert wan --model "$out/source/wan" --split 4,1+2 --actions "$cars" \
  --height 64 --width 64 --text-length 16 --window 9 --num-steps 8 --dtype fp32 --copy-parts \
  --out "$out/world"
run scd encode "$cars" --autoencoder "$out/world" --text-encoder "$out/world" --text-length 16 \
  --out "$out/latents" --device cpu --threads 1
on=(--data "$out/latents" --num-frames 9 --no-gradient-checkpointing --sample-every 0 "${cpu[@]}")
run scd train wan-tf --initial "$out/world" "${on[@]}" --batch-size 4 --max-steps 2000 \
  --ema-decay 0.99 --optim.optimizer muon --optim.muon-lr 5e-3 --optim.lr 1e-3 \
  --optim.warmup-steps 50 --optim.decay-fraction 0.3 --objective.condition-dropout 0 \
  --validate-every 500 --num-validation-clips 16 --save-every 100 --log-every 25 --out "$out/run"
run python benchmarks/action_gap.py "$out/run" --data "$out/latents" --num-frames 9 \
  --clips-per-episode 3 --out "$out/gap.json"

# Two steps: along the world's own path first, then on the student's rollouts.
on+=(--batch-size 2 --save-every 20 --log-every 20)
run scd distill wan-consistency "$out/run" "${on[@]}" --steps 1000 500 \
  --first-steps 1000 750 500 250 --objective.guidance 1 --objective.num-grid-steps 8 \
  --ema-decay 0.95 --optim.lr 5e-4 --num-accumulation 1 --max-steps 300 --out "$out/start"
run scd distill "$out/run" "${on[@]}" --initial "$out/start" --method dmd --steps 2 \
  --objective.num-given-frames 3 --ema-decay 0.9 --max-steps 200 --optim.optimizer adamw \
  --optim.lr 5e-5 --objective.critic.optimizer adamw --objective.critic.lr 2e-4 --out "$out/two"
run python benchmarks/rollouts.py --data "$out/latents" --reference "$out/run@24" \
  --ways "$out/run@2" "$out/run@8" "$out/start@2" "$out/two@2" --clips-per-episode 2 --samples 3 \
  --picture "$out/rollouts.png" --clip 6 --held left right brake --out "$out/rollouts.json"
