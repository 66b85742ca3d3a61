#!/usr/bin/env bash
# The paper's choices one by one: how context joins, the noise on it, draws per encoder pass, what the
# encoder reads, where added layers go, guidance by context noise, and the dense model. Every model is
# trained from the same seeds as the base and measured on the same clips. Stop it at any time and
# start it again: what is done stays.
#
#   runs/ablations.sh [toy|doom|paper] [FOLDER]
#
# toy: 640 steps of the toy world, some three hours on one CPU core; after 400 some seeds have not
# learned what actions do. doom: DoomMaze at 128x128 on one GPU; DATA is its folder (scd record doom
# --size 128 --frames 300). paper: SCD-M on TECO-Minecraft on 8 GPUs, as in the paper; DATA is what
# `scd encode` wrote, ALEXNET the file of published weights for LPIPS. In the environment: SEEDS,
# STEPS, KINDS.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
scale=${1:-toy}
out=${2:-runs/out/ablations/$scale}
launch=(scd)
case $scale in
toy)
  preset=toy data=toy:32 steps=640 deeper=8 thicker=6
  protocol=(--protocol toy-8-8 --horizon 24 --num-clips 128 --batch-size 32)
  # The paper trains on true histories; the preset's noise on them would hide what others do.
  base=(--objective.history-noise 0)
  ;;
doom)
  preset=doom-128 data=${DATA:?folder of DoomMaze} steps=20000 deeper=16 thicker=12
  protocol=(--protocol doom-36-264 --no-fvd)
  base=(--objective.history-noise 0)
  ;;
paper)
  preset=scd-m data=${DATA:?latents of TECO-Minecraft} steps=1000000 deeper=16 thicker=12
  weights_of teco-144-156
  protocol=(--protocol teco-144-156 "${needed[@]}")
  base=()
  launch=(torchrun --nproc-per-node 8 -m scd)
  ;;
*)
  echo "ablations.sh: needed toy, doom or paper, got $scale" >&2
  exit 2
  ;;
esac
declare -A changed=(
  [base]=""
  [prefix]="--model.decoder.join prefix"
  [token_concat]="--model.decoder.join token_concat"
  [channel_concat]="--model.decoder.join channel_concat"
  [add]="--model.decoder.join add"
  [noise_0]="--objective.context-noise 0"
  [noise_0.2]="--objective.context-noise 0.2"
  [noise_0.5]="--objective.context-noise 0.5"
  [draws_1]="--objective.num-draws 1"
  [draws_2]="--objective.num-draws 2"
  [draws_4]="--objective.num-draws 4"
  [noisy_input]="--objective.history noisy --objective.clean-fraction 0.1"
  [deep_encoder]="--model.encoder.num-layers $deeper"
  [deep_decoder]="--model.decoder.num-layers $thicker"
)
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra kinds <<<"${KINDS:-token_concat channel_concat add noise_0 noise_0.2 noise_0.5 draws_2 draws_4 \
  noisy_input deep_encoder deep_decoder dense}"
mkdir -p "$out"

# one KIND SEED: train it and measure it.
one() {
  local name=$1-$2 which=$preset flags=("${base[@]}")
  if [ "$1" = dense ]; then
    if [ "$scale" = paper ]; then which=dense-m; else which=$preset-dense; fi
  else
    read -ra more <<<"${changed[$1]:-}"
    flags+=("${more[@]}")
  fi
  run "${launch[@]}" train "$which" --data "$data" --seed "$2" --max-steps "${STEPS:-$steps}" \
    "${flags[@]}" --out "$out/runs/$name"
  run "${launch[@]}" evaluate "$out/runs/$name" --data "$data" "${protocol[@]}" --out "$out/$name.json"
}
for seed in "${seeds[@]}"; do
  for kind in base "${kinds[@]}"; do one "$kind" "$seed"; done
  # The same weights, guided away from context with noise.
  run "${launch[@]}" evaluate "$out/runs/base-$seed" --data "$data" "${protocol[@]}" \
    --guidance.kind context_noise --guidance.scale 1.5 --out "$out/guided-$seed.json"
done

worlds=()
for kind in base "${kinds[@]}"; do
  case $kind in noise_* | draws_* | noisy_input) ;; *) worlds+=("$kind=$out/runs/$kind-${seeds[0]}") ;; esac
done
[ -f "$out/turns.json" ] ||
  run python benchmarks/turns.py "${worlds[@]}" --data "$data" --out "$out/turns.json"
python tools/ablations.py "ablations_$scale" "$out"
python tools/tables.py
