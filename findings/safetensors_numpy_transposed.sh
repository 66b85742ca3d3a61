#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy.save_file` writes a transposed array in the wrong order,
# without a word.
#
# Guessed: what is read back equals what was saved; or, as from `safetensors.torch.save_file`, a
# ValueError that asks for a contiguous tensor.
# Seen: the file gets the shape of the transposed array and the memory of the one before: every
# number is there, in another place. It holds for all views in another order of memory, of arrays
# in Fortran's order too. `numpy.ascontiguousarray` before saving cures it.
# Known there as safetensors/safetensors#825.
#
# Output when this was written (safetensors 0.8.0, numpy 2.4.6, Python 3.11):
#     saved [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]]
#     Fortran's order: equal False, copied first: equal True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file


def through_a_file(array):
    save_file({"x": array}, f"{sys.argv[1]}/x.safetensors")
    return load_file(f"{sys.argv[1]}/x.safetensors")["x"]


turned = np.arange(6).reshape(2, 3).T
print(f"saved {turned.tolist()}, read {through_a_file(turned).tolist()}")
fortran = np.asfortranarray(np.arange(6).reshape(2, 3))
same = np.array_equal(through_a_file(fortran), fortran)
copied = np.array_equal(through_a_file(np.ascontiguousarray(fortran)), fortran)
print(f"Fortran's order: equal {same}, copied first: equal {copied}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="saved [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]]
Fortran's order: equal False, copied first: equal True"
if [[ $seen != "$expected" ]]; then
    echo "safetensors behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
