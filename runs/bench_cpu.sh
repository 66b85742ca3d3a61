#!/usr/bin/env bash
# The speed tables of docs/results.md, on a CPU: about 40 minutes on two idle cores.
#
#   runs/bench_cpu.sh [FOLDER]    result files go to FOLDER, docs/results if none is given
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-docs/results}
mkdir -p "$out"
# Measured anew: `scd bench` overwrites no rows.
rm -f "$out"/{bench,compare}_cpu*.jsonl
common="--device cpu --frames 20 --seconds 8"

# Everything over context and steps, both models fast; the plot is drawn from these.
# shellcheck disable=SC2086
run scd bench $common --model scd-m,dense-m --join token_concat,prefix --engine fast \
  --precision bf16 --context 16,64,144,300 --steps 4,10,50 --json "$out/bench_cpu.jsonl"
# As the models are written, in float32, and the fast engine beside them.
# shellcheck disable=SC2086
run scd bench $common --model scd-m,dense-m --join token_concat,prefix --engine plain,fast \
  --precision fp32 --context 64 --steps 10 --json "$out/bench_cpu_plain.jsonl"
# Guidance, and several streams in one batch.
# shellcheck disable=SC2086
run scd bench $common --model scd-m --join token_concat,prefix --engine fast --precision bf16 \
  --context 64 --steps 10 --guidance none,context_noise,conditions --batch 1,8 \
  --json "$out/bench_cpu_guidance.jsonl"
# A world with pixels, end to end.
# shellcheck disable=SC2086
run scd bench $common --frames 200 --model doom-64,doom-64-dense --engine plain,fast \
  --precision fp32,bf16 --steps 4,10 --json "$out/bench_cpu_doom.jsonl"
# Many sessions that share the decoder's calls.
# shellcheck disable=SC2086
run scd bench $common --frames 400 --model doom-64 --engine fast --precision bf16 \
  --steps 4 --sessions 1,2,4,8,16 --json "$out/bench_cpu_sessions.jsonl"
# shellcheck disable=SC2086
run scd bench $common --model scd-m --join prefix --engine fast --precision bf16 \
  --context 64 --steps 4 --sessions 1,4,8 --append --json "$out/bench_cpu_sessions.jsonl"

# In turns. Fast against plain, the paper's join and the prefix.
turns="--device cpu --rounds 7 --frames 3"
first=""
for join in token_concat prefix; do
  # shellcheck disable=SC2086
  run scd bench compare $turns --context 64 --steps 10 $first \
    --a "model=scd-m engine=plain precision=fp32 join=token_concat" \
    --b "model=scd-m engine=fast precision=bf16 join=$join" --json "$out/compare_cpu_engine.jsonl"
  first=--append
done
# Separable against dense, both fast.
first=""
for join in token_concat prefix; do
  for where in "--context 64 --rounds 4 --frames 2" "--context 300 --rounds 3 --frames 1"; do
    # shellcheck disable=SC2086
    run scd bench compare --device cpu --steps 50 $where --engine fast --precision bf16 $first \
      --a "model=dense-m" --b "model=scd-m join=$join" --json "$out/compare_cpu_dense.jsonl"
    first=--append
  done
done
# The paper's join against the prefix, both fast.
# shellcheck disable=SC2086
run scd bench compare --device cpu --rounds 5 --frames 3 --context 64 --steps 4,10,50 \
  --engine fast --precision bf16 --a "model=scd-m join=token_concat" --b "model=scd-m join=prefix" \
  --json "$out/compare_cpu_join.jsonl"

if [ "$out" = docs/results ]; then
  run python tools/speed.py bench_cpu
  run python tools/tables.py
fi
