#!/usr/bin/env bash
# The tables "few steps" and "drift" of docs/results.md: a teacher at 50, 10, 4, 2 and 1 steps, and
# its students at 4, 2 and 1, all measured on the same clips and timed in turns. For the toy world
# about an hour on one idle CPU core. Stop it at any time and start it again: what is done stays.
#
#   runs/few_steps.sh [FOLDER] [TEACHER] [DATA] [NAME] [FLAGS OF scd distill ...]
#
# ON_CLIPS, ON_ROLLOUTS and CLIPS in the environment are the updates of students that learn on
# recorded clips, those of students that learn on their rollouts, and the clips that are measured;
# BESIDE are the methods that are compared with consistency and dmd.
#
# Doom: runs/few_steps.sh runs/out/few_steps/doom-32 runs/out/doom_cpu/doom-32 \
#         runs/out/doom_cpu/data-32 few_steps_doom-32
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/start.sh
out=${1:-runs/out/few_steps/toy}
teacher=${2:-runs/out/demo/separable}
data=${3:-toy:32}
name=${4:-few_steps_toy}
flags=("${@:5}")
judge=$out/judge
mkdir -p "$out"

[ -d "$judge" ] || run scd train-judge --data "$data" --out "$judge"

read -ra beside <<<"${BESIDE-regression sid gan}"

# Students of consistency and regression serve every number of steps; the others are of one, and
# those of fewer steps start from that of four.
students=(consistency)
for method in "${beside[@]}"; do
  if [ "$method" = regression ]; then students+=(regression); fi
done
for method in "${students[@]}"; do
  run scd distill "$teacher" --data "$data" --method "$method" --steps 4 \
    --out "$out/runs/$method" --max-steps "${ON_CLIPS:-400}" "${flags[@]}"
done
initial=$out/runs/consistency updates=${ON_ROLLOUTS:-200}
for steps in 4 2 1; do
  run scd distill "$teacher" --data "$data" --method dmd --steps "$steps" \
    --initial "$initial" --out "$out/runs/dmd-$steps" --max-steps "$updates" "${flags[@]}"
  initial=$out/runs/dmd-4 updates=$((${ON_ROLLOUTS:-200} * 2 / 5))
done
# The other losses on rollouts, at four steps, from the same start.
for method in "${beside[@]}"; do
  [ "$method" = regression ] || run scd distill "$teacher" --data "$data" --method "$method" --steps 4 \
    --initial "$out/runs/consistency" --out "$out/runs/$method-4" \
    --max-steps "${ON_ROLLOUTS:-200}" "${flags[@]}"
done
# What a student's own rollouts add to the means against drift that training on clips has: none, noise
# on the context alone, and the teacher's noise on the history. Only where the teacher is the demo's.
if [ "$data" = toy:32 ]; then
  run scd train toy --objective.history-noise 0 --objective.context-noise 0 \
    --out "$out/runs/teacher_forced"
  run scd train toy --objective.history-noise 0 --out "$out/runs/context_noise"
fi

worlds=()
# measure NAME RUN STEPS: over the training's length, over four times that, and for the turns below.
measure() {
  worlds+=("$1-$3=$2@$3")
  common=(--data "$data" --judge "$judge" --context 8 --batch-size 32 --num-steps "$3")
  [ -f "$out/$1-$3.json" ] ||
    run scd evaluate "$2" "${common[@]}" --horizon 8 --num-clips "${CLIPS:-256}" \
      --out "$out/$1-$3.json"
  [ -f "$out/$1-$3-long.json" ] ||
    run scd evaluate "$2" "${common[@]}" --horizon 56 --num-clips "$((${CLIPS:-256} / 4))" \
      --out "$out/$1-$3-long.json"
}
for steps in 50 10 4 2 1; do measure teacher "$teacher" "$steps"; done
for method in "${students[@]}"; do
  for steps in 4 2 1; do measure "$method" "$out/runs/$method" "$steps"; done
done
for steps in 4 2 1; do measure dmd "$out/runs/dmd-$steps" "$steps"; done
for method in "${beside[@]}"; do
  [ "$method" = regression ] || measure "$method" "$out/runs/$method-4" 4
done
for world in teacher_forced context_noise; do
  if [ -d "$out/runs/$world" ]; then measure "$world" "$out/runs/$world" 10; fi
done

[ -f "$out/turns.json" ] ||
  run python benchmarks/turns.py "${worlds[@]}" --data "$data" --out "$out/turns.json"
run python tools/few_steps.py "$name" "$out"
python tools/tables.py
