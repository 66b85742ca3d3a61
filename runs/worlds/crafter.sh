#!/usr/bin/env bash
# The world "crafter" from nothing, on two CPU cores in an evening: Crafter recorded, a world of its
# pixels, a judge of actions, its evaluation and its folder.
# Stop it at any time and start it again: what is done stays.
#
#   runs/worlds/crafter.sh [FOLDER]
#
# UNTIL=recording in the environment makes the recording alone. QUICK=1 does a little of each part, to
# see that it runs, and leaves the world that is shipped as it is.
#
# What to expect on an AMD EPYC, one core a training, others at work beside it:
#   recording    16 min on two busy cores: 900 episodes of 98 frames. A map takes half a second to draw
#   world        64 min of a busy core, 0.6 to 1 s a step. Tiles are sharp after 300 steps (4 min), and
#                go where the player goes after 2,000 (23 min). Held-out loss 0.040 after 500 steps,
#                0.020 after 1,000, 0.0136 after 2,000, 0.0116 after 3,000, 0.0078 after 5,000
#   judge        4 min: reads 0.78 of the actions off held-out frames, of which 0.27 are the commonest
#   evaluation   12 min of a busy core: gain over repeating the last frame +6.2 dB at +1, +2.6 dB at
#                +8, +0.4 dB at +32
# The world that is shipped saw 184 episodes in its first 931 steps, while the others were recorded.
set -euo pipefail
cd "$(dirname "$0")/../.."
source runs/start.sh
export OMP_NUM_THREADS=1
out=${1:-runs/out/crafter}
data=$out/data
# Tiles of 16 pixels, as the game has them, without the rows of what a player has. By day: the nights of
# the game are noise. Who plays cannot be killed, has pickaxes, a sword and stones.
run scd record gym CrafterNoReward-v1 --frames-from observation --make "size=(144,144)" \
  "area=(48,48)" "actions=('noop','move_left','move_right','move_up','move_down','do','place_stone')" \
  "items={'health':9,'wood_pickaxe':1,'stone_pickaxe':1,'iron_pickaxe':1,'iron_sword':1,'stone':9}" \
  --crop 0 0 112 144 --size 112 144 --warmup 4 26 --policy runs/worlds/dig.py:play \
  --names nothing left right up down dig place --keys ArrowLeft=left ArrowRight=right ArrowUp=up \
  ArrowDown=down Space=dig KeyX=place --fps 8 --pixel-art --episodes "$(amount 900 6)" --frames 98 \
  --val-fraction 0.03 --test-fraction 0.145 --workers 2 --out "$data"
if [ "${UNTIL:-}" = recording ]; then exit; fi
# A tile is a token, so that going a step moves tokens by one place. What a tile is stands out of more
# noise than a small patch would: times are drawn later.
run scd train doom-play --data "$data" --batch-size 2 --objective.condition-dropout 0 \
  --objective.time-mean 1.4 --ema-decay 0.995 --max-steps "$(amount 5000 4)" --save-every 100 --out "$out/world"
[ -d "$out/judge" ] || run scd train-judge --data "$data" --out "$out/judge" --steps "$(amount 250 4)" \
  --batch-size 16
[ -d "$out/shipped" ] || run python examples/ship_world.py "$out/world" --data "$data" --steps 4 \
  --clips 4 --frames 20 --out "$out/shipped"
run scd evaluate "$out/shipped" --data "$data" --split test --context 16 --horizon 32 \
  --num-clips "$(amount 256 2)" --batch-size 32 --judge "$out/judge" --out "$out/evaluation.json"
shelf=${QUICK:+$out/}scd/worlds/crafter
mkdir -p "$shelf"
cp -r "$out"/shipped/* "$shelf"
