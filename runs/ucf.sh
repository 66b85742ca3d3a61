#!/usr/bin/env bash
# The paper's UCF-101 table: prediction of 12 frames after 4, separable against dense, over seeds.
# Stop it at any time and start it again.
#
#   runs/ucf.sh [small|paper] [FOLDER]
#
# small: the toy world, which has actions where UCF-101 has none; 400 steps, about twenty minutes on
# one CPU core. paper: UCF-101 in UCF, encoded by AUTOENCODER; SCD-B and its dense twin on 8 GPUs, 100
# futures of each clip; LPIPS and FVD need ALEXNET and I3D, files of published weights. In the
# environment: SEEDS, STEPS.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
scale=${1:-small}
out=${2:-runs/out/ucf/$scale}
launch=(scd)
flags=()
case $scale in
small)
  separable=toy dense=toy-dense steps=400 data=toy:32
  # The paper trains on true histories.
  flags=(--objective.history-noise 0)
  protocol=(--protocol toy-8-8 --context 4 --horizon 12 --num-clips 128 --batch-size 32)
  ;;
paper)
  separable=scd-b dense=dense-b steps=200000 data=$out/data
  protocol=(--protocol ucf101-mcvd-4-12)
  protocol+=(--alexnet "${ALEXNET:?file of AlexNet weights}" --i3d "${I3D:?file of I3D weights}")
  launch=(torchrun --nproc-per-node 8 -m scd)
  run scd encode "ucf101:${UCF:?folder of UCF-101}" --out "$data" \
    --autoencoder "${AUTOENCODER:?folder of the autoencoder}"
  ;;
*)
  echo "ucf.sh: needed small or paper, got $scale" >&2
  exit 2
  ;;
esac
read -ra seeds <<<"${SEEDS:-0 1 2}"
for seed in "${seeds[@]}"; do
  for kind in base dense; do
    preset=$separable
    if [ "$kind" = dense ]; then preset=$dense; fi
    run "${launch[@]}" train "$preset" --data "$data" --seed "$seed" \
      --max-steps "${STEPS:-$steps}" "${flags[@]}" --out "$out/runs/$kind-$seed"
    run "${launch[@]}" evaluate "$out/runs/$kind-$seed" --data "$data" "${protocol[@]}" \
      --out "$out/$kind-$seed.json"
  done
done
[ -f "$out/turns.json" ] || run python benchmarks/turns.py --data "$data" --out "$out/turns.json" \
  "base=$out/runs/base-${seeds[0]}" "dense=$out/runs/dense-${seeds[0]}"
python docs/ablations.py "ucf_$scale" "$out"
python docs/tables.py
