#!/usr/bin/env bash
# The probes of docs/results.md: dense models of 12 layers (toy world; Doom at 32x32) and of 6 (Doom),
# each probed at three lengths of training, the longest of 12 layers with all measurements. About
# three hours on one CPU core that does nothing else, most of it training.
# Stop it at any time and start it again.
#
#   runs/probes.sh [FOLDER] [DOOM DATA]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/probes}
doom=${2:-runs/out/doom_cpu/data-32}
run scd record doom --episodes 430 --frames 300 --size 32 --seed 0 --out "$doom"

# dense NAME PRESET DATA LAYERS WIDTH STEPS SAVED: a model with a checkpoint at each of three lengths.
dense() {
  run scd train "$2" --data "$3" --model.num-layers "$4" --model.block.width "$5" \
    --batch-size 4 --max-steps "$6" --save-every "$7" --validate-every "$7" --keep-checkpoints 10 \
    --sample-every 0 --out "$out/models/$1"
}
dense toy-12 toy-dense toy:32 12 128 1200 400
dense doom-32-12 doom-32-dense "$doom" 12 192 1500 500
dense doom-32-6 doom-32-dense "$doom" 6 128 1500 500

# probe NAME DATA STEP [FLAGS]: one checkpoint.
probe() {
  run scd probe "$out/models/$1/$(printf 'step_%06d' "$3")" --data "$2" --out "$out/$1-$3" "${@:4}"
}
quick=(--measurements similarity attention leave_one_out)
gathered=()
for model in toy-12 doom-32-12 doom-32-6; do
  data=$doom steps=(500 1000 1500)
  [ $model != toy-12 ] || { data=toy:32 steps=(400 800 1200); }
  for step in "${steps[@]}"; do
    flags=("${quick[@]}")
    [ "$model-$step" != toy-12-1200 ] && [ "$model-$step" != doom-32-12-1500 ] || flags=()
    probe "$model" "$data" "$step" "${flags[@]}"
    gathered+=("$model, $step steps=$out/$model-$step")
  done
done
run python tools/probes.py probes "${gathered[@]}"
python tools/tables.py
