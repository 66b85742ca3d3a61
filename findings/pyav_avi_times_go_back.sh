#!/usr/bin/env bash
# PyAV 18.1.0: frames decoded from an AVI file with B frames come in the right order, with times
# that go back and forth.
#
# Guessed: decoded frames have ascending pts, as from MP4, Matroska and MPEG-TS; so that frame n is
# the one with the n-th smallest pts, and a seek to a pts finds it.
# Seen: AVI stores no display times. Packets are numbered as they are stored, each frame keeps the
# number of the packet that it was in, and so the pts of frames in display order are 1 3 2 5 4 ...
# Sorting by pts puts frames into a wrong order; counting what the decoder gives is right.
#
# Output when this was written (PyAV 18.1.0, Python 3.11):
#     avi: pictures ascend True, times ascend False
#     mkv: pictures ascend True, times ascend True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import av
import numpy as np

for kind in ("avi", "mkv"):
    path = f"{sys.argv[1]}/clip.{kind}"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"b_strategy": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.max_b_frames = 2
        stream.codec_context.gop_size = 24
        for number in range(40):
            picture = np.full((64, 64, 3), 20 + 3 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    grey = [float(frame.to_ndarray(format="rgb24").mean()) for frame in frames]
    times = [frame.pts for frame in frames]
    print(f"{kind}: pictures ascend {grey == sorted(grey)}, times ascend {times == sorted(times)}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected=$'avi: pictures ascend True, times ascend False\nmkv: pictures ascend True, times ascend True'
[[ $seen == "$expected" ]] || { echo "PyAV behaves otherwise now: expected" >&2; echo "$expected" >&2; exit 1; }
echo "as described"
