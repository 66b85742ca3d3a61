#!/usr/bin/env bash
# safetensors 0.8.0: `load`, of bytes, gives the tensors in another order at each call.
#
# Guessed: the dictionary has the order of the file, as from `load_file`; the same bytes give equal
# dictionaries in the same order.
# Seen: the order changes from call to call, in one process. So what goes through a state dict that
# was read from bytes, to draw numbers, choose an entry by a seeded generator, or take a digest of
# all tensors, comes to another result each time; sorting the names first cures it.
#
# Output when this was written (safetensors 0.8.0, numpy 2.4.6, Python 3.11):
#     orders in 100 calls: load more than 1, load_file 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load, load_file, save_file

path = f"{sys.argv[1]}/x.safetensors"
save_file({name: np.zeros(2) for name in "abcdefgh"}, path)
data = Path(path).read_bytes()


def orders(read):
    number = len({tuple(read()) for _ in range(100)})
    return "1" if number == 1 else "more than 1"


print(f"orders in 100 calls: load {orders(lambda: load(data))}", end=", ")
print(f"load_file {orders(lambda: load_file(path))}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="orders in 100 calls: load more than 1, load_file 1"
[[ $seen == "$expected" ]] || { echo "safetensors behaves otherwise now: expected $expected" >&2; exit 1; }
echo "as described"
