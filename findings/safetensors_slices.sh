#!/usr/bin/env bash
# safetensors 0.8.0: slices of a stored tensor, read as numpy arrays, are not those of numpy.
#
# Guessed: `safe_open(...).get_slice(name)[a:b]` gives what the whole tensor gives at [a:b]: ends
# beyond the last row are cut, negative ones count from the end, and [:] is everything.
# Seen: an end beyond the last row is an error, and so is [:] of a tensor without axes, where [...]
# works. Negative ends are an OverflowError, which is no SafetensorError. Of the same file opened
# with framework="pt" slices are torch's own: cut at the end, negative ones from the end. So code
# that goes from one framework to the other has to cut its windows itself.
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
