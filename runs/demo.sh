#!/usr/bin/env bash
# The table "Toy world" of docs/results.md: about 8 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/out/demo}
scd demo --out "$out"
cp "$out/report.json" docs/results/demo.json
python docs/tables.py
