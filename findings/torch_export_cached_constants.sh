#!/usr/bin/env bash
# torch 2.13.0: torch.export.export leaves its stand-ins in a function's cache, and the module itself
# computes nothing afterwards, without an error.
#
# Guessed: a constant that a forward pass makes by a cached function (functools.lru_cache) is made as
# in any call, and is a constant of the program; exporting a module does not change it.
# Seen: the constant is made while every tensor is a FakeTensor, one without numbers, and that is what
# the cache keeps. The exported program is right. But the module, called again in the same process, now
# gives FakeTensors of the right shape, and `.item()` of one prints "zuf0", the name of an unknown
# number, in the place of one.
# Filling the cache before the export, or keeping the constant in the module, avoids it.
#
# Output when this was written (torch 2.13.0+cpu, Python 3.11):
#     before: Tensor 4.0
#     exported program: Tensor 4.0
#     module afterwards: FakeTensor zuf0
#     filled before, module afterwards: Tensor 4.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/export.py" <<'PYTHON'
import functools
import sys

import torch
from torch import nn


@functools.lru_cache
def window(size):
    return torch.hann_window(size)


class Windowed(nn.Module):
    def forward(self, x):
        return x * window(x.shape[-1])


def shown(made):
    total = made.sum().item()
    return f"{type(made).__name__} {round(total, 3) if type(made) is torch.Tensor else total}"


module, x = Windowed(), torch.ones(1, 8)
print("before:", before := shown(module(x)))
window.cache_clear()
program = torch.export.export(module, (x,)).module()
print("exported program:", exported := shown(program(x)))
print("module afterwards:", afterwards := shown(module(x)))
window.cache_clear()
module(x)
torch.export.export(module, (x,))
print("filled before, module afterwards:", filled := shown(module(x)))
same = before == exported == filled == "Tensor 4.0"
sys.exit(not (same and afterwards == "FakeTensor zuf0"))
PYTHON
"$folder/venv/bin/python" "$folder/export.py"
