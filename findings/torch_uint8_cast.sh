#!/usr/bin/env bash
# torch 2.13.0: on a CPU float32 is turned into uint8 several times more slowly than into int8.
#
# Guessed: Tensor.to(torch.uint8) and Tensor.to(torch.int8) write as many bytes from as many
# numbers, so that both take the same time, that of the memory.
# Seen: int8 is converted by vector instructions, uint8 number by number, on one thread 4 to 5 times
# as slowly; float16 and bfloat16 to uint8 are as slow. int16 to uint8 is fast again. Who quantises
# to unsigned bytes adds 1,024 and goes by float16, whose low byte is then the rounded number:
# the same bytes sooner, although that is one pass more.
#
# Output when this was written (torch 2.13.0+cpu, Python 3.11, AMD EPYC):
#     float32 to uint8 takes more than twice as long as to int8: True
#     float16 to uint8 does too: True
#     by way of float16: the same bytes: True, sooner: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

seen=$("$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
x = torch.randn(256, 8192, generator=torch.Generator().manual_seed(0)).mul_(40).add_(127)
x.clamp_(0, 255).round_()


def seconds(convert, given):
    best = float("inf")
    for _ in range(20):
        began = time.process_time()
        convert(given)
        best = min(best, time.process_time() - began)
    return best


def by_float16(given):
    return (given + 1024).to(torch.float16).view(torch.int16).to(torch.uint8)


def straight(given):
    return given.to(torch.uint8)


signed = seconds(lambda given: given.to(torch.int8), x)
print("float32 to uint8 takes more than twice as long as to int8:", seconds(straight, x) > 2 * signed)
print("float16 to uint8 does too:", seconds(straight, x.half()) > 2 * signed)
same, sooner = torch.equal(by_float16(x), straight(x)), seconds(by_float16, x) < seconds(straight, x)
print(f"by way of float16: the same bytes: {same}, sooner: {sooner}")
PYTHON
)
echo "$seen"
expected='float32 to uint8 takes more than twice as long as to int8: True
float16 to uint8 does too: True
by way of float16: the same bytes: True, sooner: True'
if [[ $seen != "$expected" ]]; then
    echo "torch behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
