#!/usr/bin/env bash
# The speed tables of docs/results.md, on one GPU, in bfloat16.
#
#   runs/bench_gpu.sh [FOLDER]    result files go to FOLDER, docs/results if none is given
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-docs/results}
mkdir -p "$out"
# Measured anew: `scd bench` overwrites no rows.
rm -f "$out"/{bench,compare}_gpu*.jsonl
common="--device cuda --precision bf16 --frames 50 --seconds 20"

# The paper's setting: 50 steps, 144 frames of context; alone, and in batches.
# shellcheck disable=SC2086
run scd bench $common --model scd-m,dense-m --join token_concat,prefix --engine plain,fast \
  --context 144 --steps 50 --batch 1,8 --json "$out/bench_gpu_paper.jsonl"
# shellcheck disable=SC2086
run scd bench $common --model scd-m --join token_concat,prefix --engine fast \
  --context 144 --steps 10,50 --batch 64 --json "$out/bench_gpu_batch.jsonl"
# Streams that are stepped independently and share calls.
# shellcheck disable=SC2086
run scd bench $common --model scd-m --join token_concat,prefix --engine fast \
  --context 144 --steps 10,50 --sessions 1,8,64 --json "$out/bench_gpu_sessions.jsonl"
# Everything over context and steps, both models fast; the plot is drawn from these.
# shellcheck disable=SC2086
run scd bench $common --model scd-m,dense-m --join token_concat,prefix --engine fast \
  --context 16,64,144,300 --steps 4,50 --json "$out/bench_gpu.jsonl"
# The shapes of Wan2.1 1.3B at few steps.
# shellcheck disable=SC2086
run scd bench $common --model wan-shape,wan-shape-dense --join token_concat,prefix --engine fast \
  --context 1,3,7,14,21 --steps 2,4 --json "$out/bench_gpu_wan.jsonl"

# In turns: fast against plain, separable against dense, the paper's join against the prefix.
turns="--device cuda --precision bf16 --rounds 7 --frames 10 --context 144 --steps 50"
first=""
for join in token_concat prefix; do
  for pair in "model=scd-m join=$join engine=plain/model=scd-m join=$join engine=fast" \
    "model=dense-m engine=fast/model=scd-m join=$join engine=fast"; do
    # shellcheck disable=SC2086
    run scd bench compare $turns $first --a "${pair%/*}" --b "${pair#*/}" \
      --json "$out/compare_gpu.jsonl"
    first=--append
  done
done
# shellcheck disable=SC2086
run scd bench compare $turns --append --json "$out/compare_gpu.jsonl" \
  --a "model=scd-m join=token_concat engine=fast" --b "model=scd-m join=prefix engine=fast"

if [ "$out" = docs/results ]; then
  run python tools/speed.py bench_gpu
  run python tools/tables.py
fi
