#!/usr/bin/env bash
# The tables of the toy world and of the long stream in docs/results.md: 9 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/demo}
run scd demo --train --out "$out"
cp "$out/report.json" docs/results/demo.json
cp "$out/frames.png" docs/images/demo-frames.png
run python benchmarks/stream.py "$out/separable" --frames 2000
python tools/tables.py
