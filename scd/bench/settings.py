"""Settings of `scd bench` and of `scd bench compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from scd.common.config import StreamPrecision, Threads, at_least, check_threads
from scd.models.config import EngineKind


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Rows of measurements: all combinations of the lists, whose entries have commas between."""

    model: str = "toy"
    """Presets (scd train), wan-1.3b, wan-1.3b-dense (with a size: wan-1.3b@256x448), or folders of
    runs or worlds."""
    context: str = ""
    """Frames of the full window. Empty: those of 16,64,144,300 that fit, or the window itself."""
    steps: str = ""
    """Denoising steps per frame. Empty: as each trained world says, 1,4,10,50 for all else."""
    batch: str = "1"
    """Streams that are stepped together."""
    sessions: str = "1"
    """Streams that are stepped independently, each at its own step; they share calls."""
    guidance: str = "none"
    """none, context_noise (separable models), conditions (models with actions, labels or text)."""
    precision: str = "fp32"
    """fp32, bf16: of weights, memory and products; int8 (CPUs), fp8 (GPUs): of the weights and
    products of the blocks of Wan models and of their memory, whose rest is bf16."""
    engine: str = "plain,fast"
    """plain: the model as it is written; fast: laid out for the machine."""
    join: str = ""
    """Joins of separable models' decoders: token_concat, token_concat_projected, channel_concat,
    add, prefix. Empty: each model's own."""
    frames: int = 50
    """Timed frames of each row."""
    seconds: float = 30.0
    """Seconds after which no further frame of a row is timed, once there are 3."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Threads = "auto"
    """CPU threads, the same for all that is timed. auto: one a core, or OMP_NUM_THREADS."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File of one JSON object per row, written row by row. Empty: only the screen."""
    append: bool = False
    """Keep the rows that the file has."""

    def __post_init__(self) -> None:
        check_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of two configurations for each context and number of steps."""

    a: str
    """The first, such as "model=scd-m engine=plain"; keys: model engine join precision context
    steps batch guidance sessions."""
    b: str
    """The second, such as "model=scd-m engine=fast join=prefix"."""
    context: str = "16"
    """Frames of the full window, where a spec says nothing; a list compares at each."""
    steps: str = ""
    """Denoising steps per frame, likewise. Empty: as each trained world says, 10 for all else."""
    batch: str = "1"
    """Streams that are stepped together, likewise."""
    precision: StreamPrecision = "fp32"
    """Of weights, memory and products, where a spec says nothing."""
    engine: EngineKind = "fast"
    """What runs the models, where a spec says nothing."""
    rounds: int = 7
    """Times that A and B take turns."""
    frames: int = 5
    """Frames of each in a round."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Threads = "auto"
    """CPU threads, the same for all that is timed. auto: one a core, or OMP_NUM_THREADS."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File of one JSON object per comparison. Empty: only the screen."""
    append: bool = False
    """Keep the comparisons that the file has."""

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds, frames=self.frames)
        check_threads(self.threads)
