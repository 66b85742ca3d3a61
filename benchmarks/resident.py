"""How much of the memory that `scd serve` promises to sessions is resident once they are played?

    python benchmarks/resident.py RUN --sessions 4 --history-frames 96

plays sessions in this process until their histories are full and compares the growth of its
resident memory with the formula; then it deletes them and looks again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import psutil
import torch
import tyro

from scd.common.memory import MIB, release
from scd.engine.open import advised_threads, open_engine
from scd.models.checkpoint import load_world
from scd.serving.admission import HostConfig
from scd.serving.host import Host
from scd.serving.messages import Close, Create, State, Step


@dataclass(frozen=True, kw_only=True)
class ResidentConfig:
    """What is played."""

    run: Annotated[str, tyro.conf.Positional]
    """World, run or step folder."""
    sessions: int = 4
    """Side by side."""
    history_frames: int = 96
    """Of each."""


def resident() -> int:
    """Return the bytes of this process that are in memory, garbage aside."""
    release()
    return psutil.Process().memory_info().rss


def main(config: ResidentConfig) -> None:
    """Play, and print what was promised and what is there."""
    world = load_world(config.run)
    torch.set_num_threads(advised_threads(world.model.config))
    engine = open_engine(world.model, "fast", release=True)
    limits = HostConfig(
        max_sessions=config.sessions + 1, history_frames=config.history_frames, max_fps=1000.0
    )
    host = Host(world, engine, limits)
    host.start()
    names, count = [], limits.history_frames + limits.keyframe_every
    try:
        for number in range(config.sessions + 1):
            if number == 1:
                # The first one warms up what all share.
                before, bare = host.overview().reserved_bytes, resident()
            state = host.ask(Create(seed=number)).result().message
            assert isinstance(state, State)
            names.append(state.session)
            for _ in range(0, count, 16):
                host.ask(Step(action=0, count=16), state.session).result()
        promised, there = host.overview().reserved_bytes - before, resident() - bare
        for name in names[1:]:
            host.ask(Close(), name).result()
        time.sleep(2.0)
        left = resident() - bare
    finally:
        host.stop()
    each = promised / config.sessions / MIB
    print(f"{config.sessions} sessions, {each:.1f} MiB promised to each")
    print(
        f"promised {promised / MIB:.0f} MiB, resident {there / MIB:.0f} MiB: {there / promised:.2f}"
    )
    print(f"after they were deleted {left / MIB:.0f} MiB are left")


if __name__ == "__main__":
    main(tyro.cli(ResidentConfig))
