#!/usr/bin/env bash
# The paper's Minecraft table: the separable model against the dense one, the same data, steps and
# seeds; quality by protocol and seconds per frame in turns. Stop it at any time and start it again.
#
#   runs/minecraft.sh [small|doom|paper] [FOLDER]
#
# small: DoomMaze at 32x32 with the doom-32 presets, 1,200 steps of 4 clips, about an hour and a half
# on one CPU core. doom: DoomMaze at 128x128 in pixels, one GPU. paper: TECO-Minecraft in MINECRAFT,
# encoded by AUTOENCODER, SCD-M and its dense twin on 8 GPUs as in the paper; LPIPS needs
# ALEXNET, a file of published weights; FVD what `scd weights i3d` fetches, or I3D and I3D_SHA256, a
# TorchScript file. In the environment: SEEDS, STEPS.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
source runs/against_dense.sh
scale=${1:-small}
out=${2:-runs/out/minecraft/$scale}
data=$out/data
launch=(scd)
flags=()
guided=()
case $scale in
small)
  separable=doom-32 dense=doom-32-dense steps=1200
  flags=(--batch-size 4)
  protocols=(doom-36-264)
  measured=(--size 0 --context 16 --horizon 24 --num-clips 64 --batch-size 32)
  # 66 episodes to test on: the protocol takes one clip of each.
  run scd record doom --size 32 --frames 300 --episodes 440 --test-fraction 0.15 --seed 0 --out "$data"
  ;;
doom)
  separable=doom-128 dense=doom-128-dense steps=20000
  protocols=(doom-144-156 doom-36-264)
  measured=()
  run scd record doom --size 128 --frames 300 --episodes 2000 --seed 0 --out "$data"
  ;;
paper)
  separable=scd-m dense=dense-m steps=1000000
  protocols=(teco-144-156 teco-36-264 teco-144-156-published teco-36-264-published)
  measured=()
  for protocol in "${protocols[@]}"; do weights_of "$protocol"; done
  guided=(--guidance.kind context_noise --guidance.scale 1.5)
  launch=(torchrun --nproc-per-node 8 -m scd)
  for shard in 0 1 2 3 4 5 6 7; do
    scd encode "minecraft:${MINECRAFT:?folder of TECO-Minecraft}" --shard "$shard/8" \
      --autoencoder "${AUTOENCODER:?folder of the autoencoder}" --out "$data" \
      --device "cuda:$shard" &
  done
  for job in $(jobs -p); do wait "$job"; done
  ;;
*)
  echo "minecraft.sh: needed small, doom or paper, got $scale" >&2
  exit 2
  ;;
esac
against_dense "minecraft_$scale"
