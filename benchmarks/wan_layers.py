"""Processor seconds of a frame of a large Wan model, by engine and precision, in turns.

    python benchmarks/wan_layers.py wan-1.3b@256x448 --context 9 --rounds 3 --out FILE

builds each with a few layers of the encoder and of the decoder and random weights, on one thread,
so that all fit into memory side by side and other work on the machine counts little: what is read
is the processor's time of this process. The time of a layer times the layers of the model gives the
frame; embedders and head, small, are counted as often.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from scd.bench.models import find_subject, random_model
from scd.bench.streams import fill_window
from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.open import open_engine
from scd.models.config import SamplingConfig
from scd.models.flow import schedule
from scd.models.wan.config import WanConfig, WanSeparableConfig

NUM_LAYERS = 3
"""Of the encoder and of the decoder that are timed."""


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """A measurement."""

    model: Annotated[str, tyro.conf.Positional] = "wan-1.3b@256x448"
    """A Wan model, as `scd bench --model` takes it."""
    against: str = ""
    """Another one, that runs in the same ways beside it; empty: none."""
    runs: tuple[str, ...] = ("plain:bf16", "fast:bf16", "fast:int8")
    """Engines and precisions; all are compared with the first."""
    context: int = 9
    """Frames of the full window."""
    steps: int = 4
    """Denoising steps."""
    words: int = 512
    """Tokens of the prompt; the rest of the text is filled up with zeros, as Wan does."""
    rounds: int = 3
    """Frames of each, in turns, after one that does not count."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        at_least(1, words=self.words, context=self.context, steps=self.steps, rounds=self.rounds)


class Timed:
    """A stream of one engine, whose window is full."""

    def __init__(
        self,
        config: WanConfig | WanSeparableConfig,
        run: str,
        context: int,
        words: int,
    ) -> None:
        kind, _, precision = run.partition(":")
        if isinstance(config, WanSeparableConfig):
            self.layers, self.decoder_layers = config.encoder.num_layers, config.decoder.num_layers
            small = replace(
                config,
                encoder=replace(config.encoder, num_layers=NUM_LAYERS),
                decoder=replace(config.decoder, num_first=1, num_last=NUM_LAYERS - 1),
            )
        else:
            self.layers = self.decoder_layers = config.num_layers
            small = replace(config, num_layers=NUM_LAYERS)
        model = random_model(small, torch.device("cpu"), torch.bfloat16)
        self.engine = open_engine(model, kind, precision, release=True)
        generator, spec = make_generator(0, "layers"), config.conditions
        text = torch.randn(1, spec.text_length, spec.text_dim, generator=generator)
        text[:, words:] = 0
        self.conditions = Conditions(text=text.to(self.engine.dtype))
        shape = config.shape.shape
        self.noise = torch.randn(1, *shape, generator=generator).to(self.engine.dtype)
        self.state = self.engine.begin(None, self.conditions, 1, context)
        fill_window(self.state, self.engine, generator)

    def frame(self, times: list[float]) -> dict[str, float]:
        """Make a frame and return the processor seconds of its parts in the whole model."""
        moments = [time.process_time()]
        context = self.engine.context(self.state, self.conditions, self.noise)
        moments.append(time.process_time())
        frame = self.engine.denoise(context, self.noise, times)
        moments.append(time.process_time())
        self.engine.observe(self.state, frame, self.conditions)
        moments.append(time.process_time())
        spent = [after - before for before, after in zip(moments, moments[1:], strict=False)]
        # The pass that remembers a frame needs only keys and values of the last layer.
        parts = {
            "context_s": spent[0] * self.layers / NUM_LAYERS,
            "steps_s": spent[1] * self.decoder_layers / NUM_LAYERS,
            "memory_s": spent[2] * (self.layers - 1) / (NUM_LAYERS - 1),
        }
        return {**parts, "frame_s": sum(parts.values())}


def measure(config: LayersConfig) -> dict[str, Any]:
    """Return the seconds of each run, and how many times as long the first one takes.

    Raises:
        ValueError: not a Wan model, or an engine or precision that it does not have.
    """
    times = schedule(SamplingConfig(num_steps=config.steps)).tolist()
    torch.set_num_threads(1)
    timed = {}
    for model in [config.model, *([config.against] if config.against else [])]:
        found = find_subject(model).config
        if not isinstance(found, WanConfig | WanSeparableConfig):
            raise ValueError(f"needed a Wan model, got {model}")
        for run in config.runs:
            name = run if model == config.model else f"{model}:{run}"
            timed[name] = Timed(found, run, config.context, config.words)
    runs = list(timed)
    frames: dict[str, list[dict[str, float]]] = {run: [] for run in runs}
    for number in range(config.rounds + 1):
        # Whatever the first one meets is shared.
        for run in runs if number % 2 == 0 else reversed(runs):
            spent = timed[run].frame(times)
            if number:
                frames[run].append(spent)
    seconds = {
        run: {part: median(one[part] for one in each) for part in each[0]}
        for run, each in frames.items()
    }
    ratios = {
        run: [a["frame_s"] / b["frame_s"] for a, b in zip(frames[runs[0]], each, strict=True)]
        for run, each in frames.items()
    }
    return {"seconds": seconds, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(LayersConfig, args=arguments, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"wan_layers.py: {error}", file=sys.stderr)
        return 2
    for run in result["seconds"]:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in result["seconds"][run].items())
        ratios = result["ratios"][run]
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{run}: {parts}; {config.runs[0]} takes {spread} times as long")
    if config.out:
        write_json({"config": to_json(config), **result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
