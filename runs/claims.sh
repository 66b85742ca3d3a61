#!/usr/bin/env bash
# The paper's claims decided by pairs of seeds, on one core: some 70 trainings of a minute each for a
# world. Stop it at any time and start it again: what is done stays.
#
#   runs/claims.sh [WORLD]        toy (the default), or cars, which is recorded first (12 minutes)
#
# SEEDS of the environment: pairs of each claim but the first, which has 8. Those whose interval is
# still wide go on to MOST_SEEDS.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
export OMP_NUM_THREADS=1
world=${1:-toy}
decide() {
  run python tools/decide.py "$1" --world "$world" --budget-s 36000 \
    --seeds "${2:-${SEEDS:-5}}" --most-seeds "${2:-${MOST_SEEDS:-5}}"
}
decide base_against_dense 8
for claim in separable_4_2_against_dense_6 token_concat_against_channel_concat \
  channel_concat_against_dense base_against_token_concat base_against_noise_0 \
  base_against_noise_0.5 draws_2_against_base draws_4_against_base base_against_noisy_input \
  guided_against_base token_concat_against_add base_against_noise_0.2 \
  deep_encoder_against_base deep_decoder_against_base deep_decoder_against_deep_encoder; do
  decide "$claim"
done
