# Sourced by the scripts beside it, after `set -euo pipefail` and from the project's folder:
# run COMMAND... waits for a command, and a signal to the script reaches that command, which saves
# before it ends.
set -m
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run() { "$@" & wait "$!"; }

# amount FULL QUICK: the second where QUICK is set in the environment, so that the whole of a script
# can be seen to run in minutes; what it makes is then good for nothing.
amount() { if [ -n "${QUICK:-}" ]; then echo "$2"; else echo "$1"; fi; }

# weights_of PROTOCOL: the flags for the published weights that a protocol measures with, in `needed`.
# ALEXNET of the environment names one; FVD takes what `scd weights i3d` fetches, or the TorchScript
# file that I3D and I3D_SHA256 name.
weights_of() {
  needed=()
  case $1 in
  teco-144-156* | ucf101-mcvd-*) needed+=(--alexnet "${ALEXNET:?file of AlexNet weights}") ;;&
  teco-36-264* | ucf101-*)
    if [ -n "${I3D:-}" ]; then
      needed+=(--i3d "$I3D" --i3d-sha256 "${I3D_SHA256:?its SHA-256}")
    else
      run scd weights i3d
    fi
    ;;
  esac
}
