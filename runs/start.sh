# Sourced by the scripts beside it, after `set -euo pipefail` and from the project's folder:
# run COMMAND... waits for a command, and a signal to the script reaches that command, which saves
# before it ends.
set -m
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run() { "$@" & wait "$!"; }
