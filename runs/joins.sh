#!/usr/bin/env bash
# Joint against prefix decoder, the same data, steps and seeds: the table "joins" of docs/results.md.
# 40 minutes on 2 CPU cores for the toy world. Stop it at any time and start it again.
#
#   runs/joins.sh [FOLDER] [PRESET] [DATA] [SEEDS...]
#
# On a GPU, over Doom: runs/joins.sh runs/out/joins-doom doom-64 runs/out/doom_gpu/data 0 1 2
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/joins}
preset=${2:-toy}
data=${3:-toy:32}
if [ "$#" -gt 3 ]; then seeds=("${@:4}"); else seeds=(0 1 2 3 4); fi
for seed in "${seeds[@]}"; do
  for join in prefix token_concat; do
    run scd train "$preset" --data "$data" --seed "$seed" --model.decoder.join "$join" \
      --out "$out/$join-$seed"
    run scd evaluate "$out/$join-$seed" --data "$data" --context 8 --horizon 8 --num-clips 256 \
      --batch-size 32 --out "$out/$join-$seed.json"
  done
done
python tools/pairs.py "joins_$preset" prefix token_concat "$out"/*-*.json
python tools/tables.py
