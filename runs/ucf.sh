#!/usr/bin/env bash
# The paper's UCF-101 table: prediction of 12 frames after 4, separable against dense, over seeds.
# Stop it at any time and start it again.
#
#   runs/ucf.sh [small|paper] [FOLDER]
#
# small: the toy world, which has actions where UCF-101 has none; 640 steps, about half an hour on
# one CPU core. paper: UCF-101 in UCF, encoded by AUTOENCODER; SCD-B and its dense twin on 8 GPUs, 100
# futures of each clip; LPIPS needs ALEXNET, a file of published weights; FVD what
# `scd weights i3d` fetches, or I3D and I3D_SHA256, a TorchScript file. In the environment: SEEDS,
# STEPS.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
source runs/against_dense.sh
scale=${1:-small}
out=${2:-runs/out/ucf/$scale}
launch=(scd)
flags=()
guided=()
case $scale in
small)
  separable=toy dense=toy-dense steps=640 data=toy:32
  # The paper trains on true histories.
  flags=(--objective.history-noise 0)
  protocols=(toy-8-8)
  measured=(--context 4 --horizon 12 --num-clips 128 --batch-size 32)
  ;;
paper)
  separable=scd-b dense=dense-b steps=200000 data=$out/data
  protocols=(ucf101-mcvd-4-12 ucf101-mcvd-4-12-published)
  measured=()
  for protocol in "${protocols[@]}"; do weights_of "$protocol"; done
  launch=(torchrun --nproc-per-node 8 -m scd)
  run scd encode "ucf101:${UCF:?folder of UCF-101}" --out "$data" \
    --autoencoder "${AUTOENCODER:?folder of the autoencoder}"
  ;;
*)
  echo "ucf.sh: needed small or paper, got $scale" >&2
  exit 2
  ;;
esac
against_dense "ucf_$scale"
