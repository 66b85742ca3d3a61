#!/usr/bin/env bash
# PyAV 18.1.0: a JPEG read as a video of one frame tells the orientation of its EXIF, as degrees.
#
# Guessed: `frame.rotation` is the display matrix of a video container; a photo has none, and its
# EXIF is for picture libraries to read.
# Seen: the decoder of FFmpeg 8 turns the EXIF orientation into a display matrix of the frame.
# The pixels stay as they are stored. So who turns frames by `rotation` has photos upright too, and
# must not turn them a second time by their EXIF.
#
# Output when this was written (PyAV 18.1.0, Pillow 13.0.0, Python 3.11):
#     stored 96x64, rotation -90
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6 pillow==13.0.0

cat > "$folder/program.py" <<'PYTHON'
import sys

import av
from PIL import Image

exif = Image.Exif()
exif[0x0112] = 6  # Orientation: to be turned clockwise by 90 degrees.
Image.new("RGB", (96, 64)).save(f"{sys.argv[1]}/photo.jpg", exif=exif)
with av.open(f"{sys.argv[1]}/photo.jpg") as container:
    frame = next(container.decode(video=0))
    print(f"stored {frame.width}x{frame.height}, rotation {frame.rotation}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
expected="stored 96x64, rotation -90"
[[ $seen == "$expected" ]] || { echo "PyAV behaves otherwise now: expected $expected" >&2; exit 1; }
echo "as described"
