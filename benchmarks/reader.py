"""Reads clips when it is told to: the half of `benchmarks/loading.py --against` that runs in any
checkout of this project, so it imports no more than what they all have.

Every line of its input, "random 40" or "ordered 40", is answered by the seconds that so many
batches took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice

from scd.data.loader import Loader

try:
    from scd.data.source import open_source
except ImportError:
    # As it was at first; the type is that of today.
    from scd.data.folder import open_source  # type: ignore[no-redef]


def main(data: str, split: str, batch_size: int, num_frames: int, workers: int) -> None:
    """Say the size of a clip, then answer line by line."""
    source = open_source(data, split)  # type: ignore[arg-type]
    loader = Loader(source, batch_size, num_frames, seed=0, workers=workers)
    height, width = source.card.height, source.card.width
    print(json.dumps({"clip_mb": num_frames * height * width * 3 / 1e6}), flush=True)

    def ordered() -> Iterator[object]:
        places = [
            (episode, start)
            for episode in range(source.num_episodes)
            for start in range(0, source.num_frames(episode) - num_frames + 1, num_frames)
        ]
        clips = (source.read(*place, num_frames) for place in cycle(places))
        while True:
            yield list(islice(clips, batch_size))

    streams = {"random": loader.stream(), "ordered": ordered()}
    for line in sys.stdin:
        name, count = line.split()
        began = time.perf_counter()
        for _ in islice(streams[name], int(count)):
            pass
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
