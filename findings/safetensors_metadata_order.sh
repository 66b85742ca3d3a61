#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and the same metadata give files of different bytes.
#
# Guessed: the header is sorted, so that equal content has one digest: tensors are laid out in a
# fixed order, and metadata is a dictionary whose order Python keeps.
# Seen: with two entries of metadata or more, their order in the header changes from call to call,
# within one process. With none or one the bytes are always the same. Who compares weights by a
# digest of the file, or wants files that can be reproduced, puts all metadata into one entry.
# Known there as safetensors/safetensors#584.
#
# Output when this was written (safetensors 0.8.0, numpy 2.4.6, Python 3.11):
#     different files of 100: without metadata 1, one entry 1, three entries more than 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import numpy as np
from safetensors.numpy import save

tensors = {"x": np.zeros(2), "y": np.ones(3)}


def different(metadata):
    number = len({save(tensors, metadata) for _ in range(100)})
    return "1" if number == 1 else "more than 1"


print(f"different files of 100: without metadata {different(None)}", end=", ")
print(f"one entry {different({'a': '1'})}", end=", ")
print(f"three entries {different({'a': '1', 'b': '2', 'c': '3'})}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py")
echo "$seen"
expected="different files of 100: without metadata 1, one entry 1, three entries more than 1"
[[ $seen == "$expected" ]] || { echo "safetensors behaves otherwise now: expected $expected" >&2; exit 1; }
echo "as described"
