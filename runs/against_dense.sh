# Sourced by the scripts of the paper's tables: both kinds of model trained from the same seeds,
# measured by protocols and timed in turns.
#
#   against_dense NAME    of the result, docs/results/NAME_PROTOCOL.json
#
# reads `out`, `data`, `separable` and `dense` (presets), `steps`, `flags` of the training,
# `protocols`, `measured` (flags of all evaluations), `guided` (more, of the separable model alone:
# a dense one has no context to put noise on) and `launch`; SEEDS and STEPS of the environment.
against_dense() {
  local seeds seed kind preset more protocol
  read -ra seeds <<<"${SEEDS:-0 1 2}"
  for seed in "${seeds[@]}"; do
    for kind in base dense; do
      if [ "$kind" = dense ]; then preset=$dense more=(); else preset=$separable more=("${guided[@]}"); fi
      run "${launch[@]}" train "$preset" --data "$data" --seed "$seed" \
        --max-steps "${STEPS:-$steps}" "${flags[@]}" --out "$out/runs/$kind-$seed"
      for protocol in "${protocols[@]}"; do
        weights_of "$protocol"
        run "${launch[@]}" evaluate "$out/runs/$kind-$seed" --data "$data" --protocol "$protocol" \
          "${measured[@]}" "${needed[@]}" "${more[@]}" --out "$out/$protocol/$kind-$seed.json"
      done
    done
  done
  for protocol in "${protocols[@]}"; do
    [ -f "$out/$protocol/turns.json" ] || run python benchmarks/turns.py --data "$data" \
      "base=$out/runs/base-${seeds[0]}" "dense=$out/runs/dense-${seeds[0]}" \
      --out "$out/$protocol/turns.json"
    python tools/ablations.py "$1_${protocol//-/_}" "$out/$protocol"
  done
  python tools/tables.py
}
