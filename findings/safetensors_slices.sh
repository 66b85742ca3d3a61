#!/usr/bin/env bash
# safetensors 0.8.0: slices of a stored tensor are not those of Python.
#
# Guessed: `safe_open(...).get_slice(name)[a:b]` gives what the whole tensor gives at [a:b]: ends
# beyond the last row are cut, negative ones count from the end, and [:] is everything.
# Seen: an end beyond the last row is an error, and so is [:] of a tensor without axes, where [...]
# works. Negative ends are an OverflowError, which is no SafetensorError. So windows into stored
# tensors have to be cut to their length by whoever reads them.
#
# Output when this was written (safetensors 0.8.0, numpy 2.4.6, Python 3.11):
#     [2:9] SafetensorError
#     [-1:] OverflowError
#     [:] of a number SafetensorError
#     [...] of a number 3.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

path = f"{sys.argv[1]}/x.safetensors"
save_file({"rows": np.arange(4.0), "number": np.array(3.0)}, path)
with safe_open(path, framework="np") as file:
    rows, number = file.get_slice("rows"), file.get_slice("number")
    for name, read in (
        ("[2:9]", lambda: rows[2:9]),
        ("[-1:]", lambda: rows[-1:]),
        ("[:] of a number", lambda: number[:]),
        ("[...] of a number", lambda: number[...]),
    ):
        try:
            print(name, read())
        except Exception as error:
            print(name, type(error).__name__)
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="[2:9] SafetensorError
[-1:] OverflowError
[:] of a number SafetensorError
[...] of a number 3.0"
if [[ $seen != "$expected" ]]; then
    echo "safetensors behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
