#!/usr/bin/env bash
# safetensors 0.8.0: files that `save_file` makes can be read by their owner alone.
#
# Guessed: a new file has the permissions that the umask leaves, 644 with the usual one, as from
# `open`, `numpy.save` and `torch.save`.
# Seen: 600 whatever the umask, also where a file of 644 is replaced. Weights in a folder that a
# group or a web server shares cannot be read by the others; `chmod` after saving cures it.
# Known there as safetensors/safetensors#782.
#
# Output when this was written (safetensors 0.8.0, numpy 2.4.6, Python 3.11):
#     numpy.save 644, safetensors 600, over a file of 644: 600
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import os
import stat
import sys

import numpy as np
from safetensors.numpy import save_file


def mode(name):
    return f"{stat.S_IMODE(os.stat(name).st_mode):o}"


os.umask(0o022)
os.chdir(sys.argv[1])
np.save("x.npy", np.zeros(2))
save_file({"x": np.zeros(2)}, "x.safetensors")
with open("y.safetensors", "wb"):
    pass
save_file({"x": np.zeros(2)}, "y.safetensors")
print(f"numpy.save {mode('x.npy')}, safetensors {mode('x.safetensors')}", end=", ")
print(f"over a file of 644: {mode('y.safetensors')}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="numpy.save 644, safetensors 600, over a file of 644: 600"
[[ $seen == "$expected" ]] || { echo "safetensors behaves otherwise now: expected $expected" >&2; exit 1; }
echo "as described"
