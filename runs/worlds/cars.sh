#!/usr/bin/env bash
# The world "cars" from nothing, on two CPU cores in an evening: CarRacing recorded, a small
# autoencoder, its latents, the world, its action judge, its evaluation and its folder.
# Stop it at any time and start it again: what is done stays.
#
#   runs/worlds/cars.sh [FOLDER]
#
# UNTIL=recording in the environment makes the recordings alone. QUICK=1 does a little of each part, to
# see that it runs, and leaves the world that is shipped as it is.
#
# What to expect, each part alone on the machine it was made on (AMD EPYC, one core a training):
#   recording    80 min on two cores, others at work: 289 episodes of 200 frames. Any number will do;
#                66 more for tests, half an hour on half a core
#   autoencoder  11 min: PSNR of held-out frames 31 dB after 300 steps, 34 after 1,200 (5 min), 35.3
#   decoder      35 min of a busy core, 15 of an idle one: 35.2 dB, and its borders of cells, 1.4 times
#                as rough as those of real frames before, as rough as those (1.06)
#   latents      half a minute
#   world        29 min, 0.24 s a step: held-out loss 0.54 after 1,000 steps (4 min: it drives, roads
#                dissolve where the car stands), 0.42 after 2,000, 0.39 after 3,000, 0.30 after 7,000
#   world-2      51 min beside other work: held-out loss 0.297 after 2,000 steps, 0.274 after 6,000
#   evaluation   3 min: gain over repeating the last frame +7.5 dB at +8, +2.6 dB at +32
# The decoder of the world that is shipped learnt its first 3,600 steps without --border-weight, to
# the end of their rate (1.38), 2,400 as below, and 2,400 more (--initial, --reconstruction-steps 0).
set -euo pipefail
cd "$(dirname "$0")/../.."
source runs/start.sh
export OMP_NUM_THREADS=1
out=${1:-runs/out/cars}
data=$out/data
recording=(scd record gym CarRacing-v3 --make continuous=False --frames-from observation
  --crop 0 6 84 84 --size 64 --frame-skip 3 --warmup 17 60 --policy runs/worlds/drive.py:drive
  --frames "$(amount 200 100)" --names nothing right left gas brake)
run "${recording[@]}" --episodes "$(amount 289 5)" --workers 2 --out "$data"
# Other roads than those above, for tests alone: 256 clips of 48 frames that do not overlap.
run "${recording[@]}" --episodes "$(amount 66 3)" --seed 1 --val-fraction 0 --test-fraction 0.97 \
  --workers 1 --out "$out/test"
if [ "${UNTIL:-}" = recording ]; then exit; fi
autoencoder=(scd train-autoencoder --data "$data" --out "$out/autoencoder" --network small-16
  --reconstruction-steps "$(amount 2400 8)" --batch-size 8 --num-frames 1
  --perceptual-weight 0.1 --precision bf16 --ema-decay 0.99 --optim.optimizer muon
  --optim.muon-lr 5e-3 --optim.lr 2e-3 --optim.warmup-steps 50 --optim.decay-fraction 0.5
  --num-validation-clips 60 --validate-every 600 --save-every 200 --num-loader-workers 1)
[ -f "$out/autoencoder/held_out.json" ] || run "${autoencoder[@]}" --adversarial-steps 0
# Then the decoder alone, which leaves the latents as they are: edges, and above all those across the
# borders of cells, where a grid would show.
run "${autoencoder[@]}" --adversarial-steps "$(amount 6000 8)" --adversarial-weight 0 \
  --edge-weight 2 --border-weight 8 --latent-noise 0.1
run scd encode "$data" --autoencoder "$out/autoencoder" --out "$out/latents" --precision bf16
# Four rows of four cells are a frame's tokens. Nobody will hide the action: no dropout of it.
run scd train doom-play --data "$out/latents" --model.shape.patch-size 1 --out "$out/world" \
  --objective.condition-dropout 0 --ema-decay 0.995 --max-steps "$(amount 7000 8)" --save-every 200
# Once more from there, at half the rate.
run scd train doom-play --data "$out/latents" --model.shape.patch-size 1 --out "$out/world-2" \
  --initial "$out/world" --objective.condition-dropout 0 --ema-decay 0.998 --optim.lr 5e-4 \
  --optim.muon-lr 3e-3 --optim.decay-fraction 0.8 --max-steps "$(amount 6000 8)" --save-every 200
[ -d "$out/judge" ] || run scd train-judge --data "$data" --out "$out/judge" --steps "$(amount 500 8)"
# A network that predicts clean frames needs few steps by itself: four instead of ten lose nothing.
[ -d "$out/shipped" ] || run python examples/ship_world.py "$out/world-2" --data "$data" --steps 4 \
  --clips 4 --frames 22 --out "$out/shipped"
run scd evaluate "$out/shipped" --data "$out/test" --split test --context 16 --horizon 32 \
  --num-clips "$(amount 256 4)" --batch-size 32 --judge "$out/judge" --out "$out/evaluation.json"
shelf=${QUICK:+$out/}scd/worlds/cars
mkdir -p "$shelf"
cp -r "$out"/shipped/* "$shelf"
