#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process.
#
# Guessed: two processes that share the work, as torchrun starts them, or an error.
# Seen: one process, whose state says that it is the only one, and exit status 0. A training that is
# meant for two takes twice as long, at half the batch size, and nobody says so. (With MPI named in
# its configuration accelerate does start several.)
#
# Output when this was written (accelerate 1.15.0, torch 2.13.0, Python 3.11):
#     accelerate: 1 process(es), status 0
#     torchrun: 2 process(es), status 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0

cat > "$folder/count.py" <<'PYTHON'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}", flush=True)
PYTHON

# No configuration of this user.
export HF_HOME=$folder/home
count() {
    local name=$1 status=0
    shift
    "$folder/venv/bin/$1" "${@:2}" "$folder/count.py" > "$folder/said" 2> "$folder/errors" || status=$?
    echo "$name: $(grep -c '^process' "$folder/said" || true) process(es), status $status"
}
seen=$(
    count accelerate accelerate launch --cpu --num_processes 2
    count torchrun torchrun --nproc-per-node 2
)
echo "$seen"
expected=$'accelerate: 1 process(es), status 0\ntorchrun: 2 process(es), status 0'
if [[ $seen != "$expected" ]]; then
    echo "accelerate behaves otherwise now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
