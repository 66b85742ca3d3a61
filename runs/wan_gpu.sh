#!/usr/bin/env bash
# Wan2.1 1.3B at full size with random weights on one GPU of 80 GB or more: seconds, frames per
# second and memory of separable and dense in one run, and a step of each stage of training.
# Stop it at any time and start it again: what is done stays.
#
#   runs/wan_gpu.sh [FOLDER]            results go to FOLDER/results
#   SMALL=1 runs/wan_gpu.sh [FOLDER]    the same commands on a CPU at a tiny size, whose figures say
#                                       nothing
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/wan_gpu}
results=$out/results
mkdir -p "$results"

sizes="" picture="" rounds="--frames 30 --seconds 30" device=cuda precision=bf16
contexts=1,3,7,14,21 frames=21 seconds=5 steps=6 window=21 split=25,5+5 train="" eight=fp8
if [ "${SMALL:-}" = 1 ]; then
  sizes="--num-heads 2 --head-dim 12 --ffn-dim 40 --num-layers 3 --text-dim 32 --vae-dim 4
    --height 32 --width 32 --num-frames 17"
  picture="--height 32 --width 32 --text-length 16" rounds="--frames 3 --seconds 1"
  device=cpu precision=fp32 eight=bf16 contexts=1,5 frames=5 seconds=1 steps=2 window=5 split=2,1+1
  train="--device cpu --precision fp32"
fi

# A command whose result is there is not run again: done NAME COMMAND...
once() {
  local name=$1
  shift
  [ -e "$results/$name.done" ] && return
  rm -f "$results/$name.jsonl"
  run "$@"
  touch "$results/$name.done"
}

# shellcheck disable=SC2086
once folder python examples/random_wan.py "$out/source" $sizes
for kind in separable dense; do
  [ "$kind" = dense ] && layers=dense || layers=$split
  # shellcheck disable=SC2086
  [ -d "$out/$kind" ] || run scd convert wan --model "$out/source/wan" --split "$layers" \
    --window "$window" $picture --out "$out/$kind"
done

# All passes of the network over a latent frame, with operations and bytes by formula beside.
# shellcheck disable=SC2086
once bench scd bench --model "$out/separable,$out/dense" --context "$contexts" --steps 2,4 \
  --engine plain,fast --precision "$precision" --device "$device" $rounds --json "$results/bench.jsonl"
# In turns, so that whatever else the machine does meets both.
# shellcheck disable=SC2086
once compare scd bench compare --a "model=$out/dense engine=fast" \
  --b "model=$out/separable engine=fast" --context "$window" --steps 4 --rounds 3 --frames 5 \
  --precision "$precision" --device "$device" --json "$results/compare.jsonl"

# Weights, products and the past in 8 bits beside bfloat16: seconds and memory.
# shellcheck disable=SC2086
once bench-eight scd bench --model "$out/separable,$out/dense" --context "$window" --steps 2,4 \
  --engine fast --precision "$precision,$eight" --device "$device" $rounds \
  --json "$results/bench-eight.jsonl"
for kind in separable dense; do
  # shellcheck disable=SC2086
  once "compare-eight-$kind" scd bench compare --a "model=$out/$kind precision=$precision" \
    --b "model=$out/$kind precision=$eight" --engine fast --context "$window" --steps 4 --rounds 3 \
    --frames 5 --device "$device" --json "$results/compare-eight-$kind.jsonl"
done

# Five seconds of video: first frame, denoise-only, and end to end by decoder.
for kind in separable dense; do
  for num in 4 2; do
    for decoder in wan tiny; do
      small=""
      [ "$decoder" = tiny ] && small="--tiny $out/source/taew/taew.safetensors"
      # shellcheck disable=SC2086
      once "video-$kind-$num-$decoder" scd sample "$out/$kind" --prompt "the red dog runs over snow" \
        --seconds "$seconds" --steps "$num" --precision "$precision" --device "$device" $small \
        --text-cache "$out/texts" --out "$results/video-$kind-$num-$decoder"
    done
  done
done

# A few steps of stage one and of stage two: seconds per step and peak memory are in log.jsonl. Stage
# two holds three models; what its optimisers keep is in the memory of the CPU, to be sure of 80 GB.
# shellcheck disable=SC2086
once encode scd encode "$out/source/clips" --autoencoder "$out/source/wan" \
  --text-encoder "$out/source/wan" --text-length "$([ -n "$picture" ] && echo 16 || echo 512)" \
  --device "$device" --out "$out/latents"
for kind in separable dense; do
  # shellcheck disable=SC2086
  once "train-$kind" scd train wan-tf --data "$out/latents" --initial "$out/$kind" \
    --num-frames "$frames" --batch-size 1 --max-steps "$steps" --log-every 1 --save-every 0 \
    --validate-every 0 --sample-every 0 $train --out "$out/train-$kind"
  # shellcheck disable=SC2086
  once "distill-$kind" scd distill wan-dmd "$out/$kind" --prompts "$out/source/prompts.txt" \
    --teacher "$out/source/wan" --embedded "$out/prompts" --num-frames "$frames" \
    --num-accumulation 1 --max-steps 2 --save-every 0 --sample-every 0 \
    --objective.min-spread 0 --optim.state offload --objective.critic.state offload $train \
    --out "$out/distill-$kind"
  for stage in train distill; do
    [ -f "$results/$stage-$kind.jsonl" ] || cp "$out/$stage-$kind/log.jsonl" \
      "$results/$stage-$kind.jsonl"
  done
done
echo "results are in $results"
