"""A world in twelve lines: load, begin from a clip, steer by names, save a video, wrap for agents.

python examples/first_hour.py    (a few seconds on a laptop; writes first_hour.mp4)
"""

import gymnasium

import scd

world = scd.load("doom")  # a folder, a run, or owner/name on the hub as well
rollout = scd.Rollout(world)
frames = list(rollout.begin(world.clips[0])[0])  # each [3, h, w] in [-1, 1]
for action in ["forward"] * 12 + ["left"] * 8 + ["forward"] * 12:  # of world.card.action_names
    frames.append(rollout.step(action)[0])
scd.write_video(frames, "first_hour.mp4", fps=world.card.fps)

env = gymnasium.make("scd/Doom-v0")  # scd.WorldEnv(world, judge=...) with rewards of your own
frame, _ = env.reset(seed=0)  # uint8 [h, w, 3]
for _ in range(8):
    frame, reward, ended, cut_off, _ = env.step(env.action_space.sample())
