#!/usr/bin/env bash
# torch 2.13.0: building a network on the device "meta", where there are no numbers, imports the whole
# compiler as soon as one of its layers draws its first weights from a normal distribution.
#
# Guessed: `with torch.device("meta")` is the cheap way to build what is loaded afterwards; drawing
# into a tensor without memory does nothing.
# Seen: nn.Embedding's normal_ on "meta" is done by a decomposition in Python, whose wrapper imports
# torch._dynamo, and with it torch._inductor and sympy: some 800 modules, a second and tens of
# megabytes that stay, in a process that compiles nothing. nn.Linear, which draws uniformly, imports
# nothing.
# A mode that returns the tensor wherever torch.nn.init or normal_ is called avoids it.
#
# Output when this was written (torch 2.13.0+cpu, Python 3.11):
#     Linear: 1 modules more, 1 MB, []
#     Embedding: 828 modules more, 76 MB, ['sympy', 'torch._dynamo', 'torch._inductor']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/build.py" <<'PYTHON'
import os
import sys

import torch
from torch import nn


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


make = {"Linear": lambda: nn.Linear(4, 4), "Embedding": lambda: nn.Embedding(4, 4)}[sys.argv[1]]
make()
modules, memory = len(sys.modules), resident_mb()
with torch.device("meta"):
    make()
found = sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules))
more = len(sys.modules) - modules
print(f"{sys.argv[1]}: {more} modules more, {resident_mb() - memory:.0f} MB, {found}")
sys.exit(bool(found) != (sys.argv[1] == "Embedding"))
PYTHON
"$folder/venv/bin/python" "$folder/build.py" Linear
"$folder/venv/bin/python" "$folder/build.py" Embedding
