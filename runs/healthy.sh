#!/usr/bin/env bash
# A good run and three bad ones, for docs/healthy-runs.md: four trainings of some minutes each on
# one core, on a frozen lake without holes, where nothing moves but by the actions. Stop it at any
# time and start it again: what is done stays.
#
#   runs/healthy.sh [FOLDER]
#
# Needs pip install -e ".[gym]". STEPS of the environment: training steps.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/healthy}
data=$out/lake
[ -d "$data" ] || run scd record gym FrozenLake-v1 --frames-from render --size 32 \
  --make is_slippery=False 'desc=["SFFF","FFFF","FFFF","FFFG"]' --episodes 150 --frames 100 \
  --stickiness 0.3 --val-fraction 0.2 --names left down right up --out "$data"
[ -d "$out/late" ] || run python tools/healthy.py late "$data" "$out/late"
one() {
  local name=$1 clips=$2
  shift 2
  run scd train toy --data "$clips" --max-steps "${STEPS:-600}" --validate-every 50 --sample-every 0 \
    --model.block.width 96 --model.block.head-dim 48 --model.block.rotary-axes 12 18 18 \
    --model.encoder.num-layers 3 --model.decoder.num-layers 1 --num-frames 12 --threads 1 \
    --model.conditions.num-actions 4 --objective.history-noise 0 "$@" --out "$out/$name"
}
one good "$data"
one rate "$data" --optim.muon-lr 0.3 --optim.lr 0.05
one late-run "$out/late"
one noise "$data" --objective.history noisy --objective.clean-fraction 0
python tools/healthy.py draw "$data" good="$out/good" rate_too_high="$out/rate" \
  actions_one_late="$out/late-run" noisy_histories="$out/noise"
