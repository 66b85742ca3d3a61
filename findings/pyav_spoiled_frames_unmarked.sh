#!/usr/bin/env bash
# PyAV 18.1.0: a damaged packet loses one frame, and the frames that are made from it come out wrong
# without a mark.
#
# Guessed: frame.is_corrupt marks all pictures that are not what was encoded, so that leaving out
# those that are marked leaves out the damage.
# Seen: only the damaged frame is refused (an error of its packet) or marked. Those after it are
# predicted from a picture that is not there, are wrong up to the next keyframe, and is_corrupt is
# False for them. After a gap or a marked frame nothing may be trusted before the next keyframe.
#
# Output when this was written (PyAV 18.1.0, Python 3.11):
#     frames not given: [10]
#     frames marked corrupt: []
#     frames that differ: 11 .. 23, 13 in all
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys
from contextlib import suppress

import av
import numpy as np

path = f"{sys.argv[1]}/clip.mp4"
noise = np.random.default_rng(0).integers(0, 40, (48, 64, 64, 3))
still = np.random.default_rng(1).integers(0, 80, (64, 64, 3))
with av.open(path, "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.codec_context.gop_size = 24
    for number in range(48):
        picture = (still + noise[number] // 4 + 2 * number).astype(np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def decode():
    pictures = {}
    with av.open(path) as container:
        for packet in container.demux(video=0):
            with suppress(av.error.InvalidDataError):
                for frame in packet.decode():
                    pictures[frame.pts] = frame.is_corrupt, frame.to_ndarray(format="rgb24")
    return pictures


sound = decode()
with av.open(path) as container:
    packet = [packet for packet in container.demux(video=0) if packet.size][10]
data = bytearray(open(path, "rb").read())
middle = packet.pos + packet.size // 2
data[middle : middle + packet.size // 4] = bytes(packet.size // 4)
open(path, "wb").write(data)
torn = decode()
order = sorted(sound)
marked = [order.index(time) for time in torn if torn[time][0]]
wrong = [
    place
    for place, time in enumerate(order)
    if time in torn and (torn[time][1] != sound[time][1]).any()
]
print(f"frames not given: {[place for place, time in enumerate(order) if time not in torn]}")
print(f"frames marked corrupt: {marked}")
print(f"frames that differ: {wrong[0]} .. {wrong[-1]}, {len(wrong)} in all")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder" 2> /dev/null)
echo "$seen"
expected=$'frames not given: [10]\nframes marked corrupt: []\nframes that differ: 11 .. 23, 13 in all'
[[ $seen == "$expected" ]] || { echo "PyAV behaves otherwise now: expected" >&2; echo "$expected" >&2; exit 1; }
echo "as described"
