#!/usr/bin/env bash
# opensimplex 0.4.5.1 (which Crafter needs) installs its own tests as the package `tests`.
#
# Guessed: installing a library adds modules of its name alone, so `from tests.helpers import ...` of a
# project whose folder `tests` has no __init__.py works whatever is installed.
# Seen: the wheel has `tests/__init__.py` beside `opensimplex/`. A package anywhere on the path wins over
# a folder without __init__.py in the current one, so the project's own `tests` is no longer found.
# An empty tests/__init__.py in the project is the remedy.
#
# Output when this was written (opensimplex 0.4.5.1, Python 3.11):
#     before: ours
#     after: ModuleNotFoundError: No module named 'tests.helpers'
#     with __init__.py: ours
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
mkdir -p "$folder/project/tests"
echo 'print("ours")' > "$folder/project/tests/helpers.py"
look() {
    (cd "$folder/project" && "$folder/venv/bin/python" -c "import tests.helpers" 2>&1 || true) | tail -1
}
seen="before: $(look)"
"$folder/venv/bin/pip" install --quiet opensimplex==0.4.5.1 numpy==2.4.6
seen+=$'\n'"after: $(look)"
touch "$folder/project/tests/__init__.py"
seen+=$'\n'"with __init__.py: $(look)"
echo "$seen"
expected=$'before: ours\nafter: ModuleNotFoundError: No module named \'tests.helpers\'\nwith __init__.py: ours'
[[ $seen == "$expected" ]] || { echo "it is otherwise now: expected" >&2; echo "$expected" >&2; exit 1; }
echo "as described"
