#!/usr/bin/env bash
# All three interventions in a trained dense model, each with its control: docs/interventions.md. The
# layers are those of a model of 12.
# Four finetunings (the control serves all three), each as long as 300 training steps, and a separable
# model from scratch, which takes about as long as the run.
# Stop it at any time and start it again.
#
#   runs/interventions.sh RUN [FOLDER] [STEPS] [SKIPPED] [FULL STEPS] [LAST] [ENCODER] [DECODER]
#
# The tables of docs/results.md: runs/probes.sh first, then
#
#   runs/interventions.sh runs/out/probes/models/doom-32-6 runs/out/interventions 250 3-4 2 2 4 1+2
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
model=${1:?needs the folder of a dense run first}
out=${2:-runs/out/interventions}
steps=${3:-300}
skipped=${4:-4-8}
full_steps=${5:-5}
last=${6:-3}
encoder=${7:-8}
decoder=${8:-2+4}
run scd intervene skip "$model" --layers "$skipped" --full-steps "$full_steps" \
  --max-steps "$steps" --out "$out/skip"
run scd intervene diagonal "$model" --last "$last" --max-steps "$steps" --out "$out/diagonal" \
  --control-from "$out/skip"
run scd intervene recompose "$model" --encoder "$encoder" --decoder "$decoder" \
  --max-steps "$steps" \
  --out "$out/recompose" --control-from "$out/skip"
