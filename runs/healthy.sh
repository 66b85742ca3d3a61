#!/usr/bin/env bash
# A good run and three bad ones, for docs/healthy-runs.md: four trainings of a minute or so each on
# one core, on recordings of CarRacing, which take 12 minutes (extra gym). Stop it at any time and
# start it again: what is done stays.
#
#   runs/healthy.sh [FOLDER]
#
# STEPS of the environment: training steps, of which four checkpoints are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/healthy}
steps=${STEPS:-800}
data=$out/data
# The recordings of the world "cars" of tools/decide.py.
run scd record gym CarRacing-v3 --make continuous=False --frames-from observation --crop 0 6 84 84 \
  --size 32 --frame-skip 3 --warmup 17 60 --policy runs/worlds/drive.py:drive \
  --names nothing right left gas brake --episodes 100 --frames 100 --val-fraction 0.2 --workers 1 \
  --out "$data"
[ -d "$out/late" ] || run python tools/healthy.py late "$data" "$out/late"
one() {
  local name=$1 clips=$2
  shift 2
  # Size and rates of tools/decide.py. Joined by channels, which listens soonest.
  run scd train toy --data "$clips" --max-steps "$steps" --validate-every 100 --sample-every 0 \
    --model.block.width 96 --model.block.head-dim 48 --model.block.rotary-axes 12 18 18 \
    --model.encoder.num-layers 3 --model.decoder.num-layers 1 \
    --model.decoder.join channel_concat --model.conditions.num-actions 5 --num-frames 12 --threads 1 \
    --num-loader-workers 1 --precision fp32 --optim.lr 0.003 --optim.muon-lr 0.03 \
    --objective.history-noise 0 --save-every $((steps / 4)) --keep-checkpoints 4 "$@" --out "$out/$name"
}
one good "$data"
one rate "$data" --optim.muon-lr 0.6 --optim.lr 0.06
one late-run "$out/late"
one noise "$data" --objective.history noisy --objective.clean-fraction 0
python tools/healthy.py draw "$data" good="$out/good" rate_too_high="$out/rate" \
  actions_one_late="$out/late-run" noisy_histories="$out/noise"
