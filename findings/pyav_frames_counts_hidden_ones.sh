#!/usr/bin/env bash
# PyAV 18.1.0: `stream.frames` of a trimmed MP4 counts frames that the decoder never gives.
#
# Guessed: the number in the header is the number of frames that one gets, unless the file is cut
# off or damaged.
# Seen: an MP4 trimmed without encoding anew keeps the frames between the keyframe and the first
# one wanted, and hides them by an edit list. `stream.frames` counts them, decoding leaves them
# out; `stream.index_entries` says which: `is_discard`.
#
# Output when this was written (PyAV 18.1.0, Python 3.11):
#     frames 30, decoded 18, entries not discarded 18
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import av
import numpy as np

whole, trimmed = f"{sys.argv[1]}/whole.mp4", f"{sys.argv[1]}/trimmed.mp4"
with av.open(whole, "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"bf": "0", "sc_threshold": "0"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.codec_context.gop_size = 30
    for number in range(60):
        picture = np.full((64, 64, 3), 20 + 3 * number, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))
with av.open(whole) as source, av.open(trimmed, "w", options={"use_editlist": "1"}) as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    packets = [packet for packet in source.demux(video=0) if packet.size]
    begin = packets[42].pts  # Frame 42 is wanted first; the keyframe before it is frame 30.
    for packet in packets[30:]:
        packet.pts, packet.dts = packet.pts - begin, packet.dts - begin
        packet.stream = stream
        target.mux(packet)
with av.open(trimmed) as container:
    stream = container.streams.video[0]
    kept = sum(not entry.is_discard for entry in stream.index_entries)
    decoded = sum(1 for _ in container.decode(stream))
    print(f"frames {stream.frames}, decoded {decoded}, entries not discarded {kept}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="frames 30, decoded 18, entries not discarded 18"
[[ $seen == "$expected" ]] || { echo "PyAV behaves otherwise now: expected $expected" >&2; exit 1; }
echo "as described"
