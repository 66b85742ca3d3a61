#!/usr/bin/env bash
# torch 2.13.0: an exported ONNX model holds the paths and lines of its author's source code.
#
# Guessed: graph, weights and names; of its origin the producer's name and version.
# Seen: each node of torch.onnx.export(..., dynamo=True) has a `pkg.torch.onnx.stack_trace` with the
# absolute path of the file in which it was traced, and that line of it. So a model that is passed on
# tells the folders of its author, and of a private network its code line by line. It is said nowhere
# near the function, and no argument of it leaves it out.
#
# Output when this was written (torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, Python 3.11):
#     paths of the source in the model: True
#     lines of the source in the model: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6

mkdir "$folder/my-private-project"
cat > "$folder/my-private-project/network.py" <<'PYTHON'
import sys

import torch


class Network(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1  # Our secret.


program = torch.onnx.export(Network(), (torch.ones(3),), dynamo=True, verbose=False)
program.save(sys.argv[1])
PYTHON

"$folder/venv/bin/python" -W ignore "$folder/my-private-project/network.py" "$folder/model.onnx" \
    > "$folder/said" 2>&1
seen=$(
    "$folder/venv/bin/python" - "$folder/model.onnx" <<'PYTHON'
import sys
from pathlib import Path

data = Path(sys.argv[1]).read_bytes()
print(f"paths of the source in the model: {b'my-private-project/network.py' in data}")
print(f"lines of the source in the model: {b'Our secret' in data}")
PYTHON
)
echo "$seen"
expected=$'paths of the source in the model: True\nlines of the source in the model: True'
if [[ $seen != "$expected" ]]; then
    echo "torch.onnx behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
