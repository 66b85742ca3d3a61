#!/usr/bin/env bash
# All three interventions in a trained dense model of 12 layers, each with its control: docs/interventions.md.
# Four finetunings (the control serves all three), each as long as 300 training steps, and a separable
# model from scratch, which takes about as long as the run.
# Stop it at any time and start it again.
#
#   runs/interventions.sh RUN [FOLDER] [STEPS]
set -euo pipefail
cd "$(dirname "$0")/.."
# A signal to this script reaches the commands that it waits for, which save before they end.
set -m
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run() { "$@" & wait "$!"; }
model=${1:?needs the folder of a dense run first}
out=${2:-runs/out/interventions}
steps=${3:-300}
run scd intervene skip "$model" --layers 4-8 --full-steps 5 --max-steps "$steps" --out "$out/skip"
run scd intervene diagonal "$model" --last 3 --max-steps "$steps" --out "$out/diagonal" \
  --control-from "$out/skip"
run scd intervene recompose "$model" --encoder 8 --decoder 2+4 --max-steps "$steps" \
  --out "$out/recompose" --control-from "$out/skip"
