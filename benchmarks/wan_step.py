"""Processor seconds of a decoder step beside diffusers' WanTransformer3DModel of as many layers.

    python benchmarks/wan_step.py wan-1.3b@256x448 --rounds 5 --out FILE

calls both in turns over as many tokens, on one thread and with random weights: the decoder of a
separable model over a noisy frame and its context, and diffusers' class over two latent frames. It
makes keys and values of the text in every call; ours has them since the prompt came. What is read
is the processor's time of this process, so that other work on the machine counts little.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from scd.bench.models import find_subject, random_model
from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import STREAM_DTYPES, make_generator
from scd.data.clip import Conditions
from scd.engine.open import open_engine
from scd.models.wan.config import WanSeparableConfig


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A measurement."""

    model: Annotated[str, tyro.conf.Positional] = "wan-1.3b@256x448"
    """A separable Wan model, as `scd bench --model` takes it."""
    runs: tuple[str, ...] = ("fast:bf16", "fast:int8", "plain:bf16")
    """Engines and precisions of our decoder."""
    theirs: tuple[str, ...] = ("bf16", "fp32")
    """Precisions of diffusers' class."""
    words: int = 512
    """Tokens of the prompt; the rest of the text is filled up with zeros, as Wan does."""
    rounds: int = 5
    """Calls of each, in turns, after one that does not count."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        at_least(1, words=self.words, rounds=self.rounds)
        for precision in self.theirs:
            if precision not in ("bf16", "fp32"):
                raise ValueError(f"theirs must be bf16 or fp32, got {precision!r}")


def our_step(config: WanSeparableConfig, run: str, text: torch.Tensor) -> Callable[[], Any]:
    """Return what makes one decoder step of a frame whose context is there."""
    kind, _, precision = run.partition(":")
    # The encoder is not measured: one layer of it makes a context.
    small = replace(config, encoder=replace(config.encoder, num_layers=1))
    model = random_model(small, torch.device("cpu"), torch.bfloat16)
    engine = open_engine(model, kind, precision, release=True)
    conditions = Conditions(text=text.to(engine.dtype))
    noise = torch.randn(1, *config.shape.shape, generator=make_generator(0, "step"))
    noise = noise.to(engine.dtype)
    state = engine.begin(None, conditions, 1, 1)
    context = engine.context(state, conditions, noise)
    return lambda: engine.denoise(context, noise, [0.8, 0.0])


def their_step(config: WanSeparableConfig, precision: str, text: torch.Tensor) -> Callable[[], Any]:
    """Return what calls diffusers' class once over two latent frames."""
    block, shape = config.block, config.shape
    dtype = STREAM_DTYPES[precision]
    model = WanTransformer3DModel(
        num_attention_heads=block.num_heads,
        attention_head_dim=block.head_dim,
        in_channels=shape.channels,
        out_channels=shape.channels,
        text_dim=config.conditions.text_dim,
        freq_dim=block.freq_dim,
        ffn_dim=block.ffn_dim,
        num_layers=config.decoder.num_layers,
        patch_size=(1, shape.patch_size, shape.patch_size),
    )
    model = torch.nn.Module.to(model, dtype).eval()
    size = (1, shape.channels, 2, shape.height, shape.width)
    noisy = torch.randn(size, generator=make_generator(0, "step")).to(dtype)
    given = {"timestep": torch.tensor([800.0]), "encoder_hidden_states": text.to(dtype)}
    return lambda: model(hidden_states=noisy, **given)


@torch.no_grad()
def measure(config: StepConfig) -> dict[str, Any]:
    """Return the seconds of each call, and how many times as long each of theirs takes.

    Raises:
        ValueError: not a separable Wan model, or an engine or precision that it does not have.
    """
    torch.set_num_threads(1)
    found = find_subject(config.model).config
    if not isinstance(found, WanSeparableConfig):
        raise ValueError(f"needed a separable Wan model, got {config.model}")
    spec, generator = found.conditions, make_generator(0, "text")
    text = torch.randn(1, spec.text_length, spec.text_dim, generator=generator)
    text[:, config.words :] = 0
    calls = {run: our_step(found, run, text) for run in config.runs}
    calls |= {f"diffusers:{one}": their_step(found, one, text) for one in config.theirs}
    seconds: dict[str, list[float]] = {run: [] for run in calls}
    for number in range(config.rounds + 1):
        for run, call in calls.items() if number % 2 == 0 else reversed(calls.items()):
            began = time.process_time()
            call()
            if number:
                seconds[run].append(time.process_time() - began)
    ratios = {
        run: {
            f"diffusers:{one}": [
                theirs / ours
                for theirs, ours in zip(seconds[f"diffusers:{one}"], seconds[run], strict=True)
            ]
            for one in config.theirs
        }
        for run in config.runs
    }
    return {"seconds": seconds, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(StepConfig, args=arguments, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"wan_step.py: {error}", file=sys.stderr)
        return 2
    for run, each in result["seconds"].items():
        told = [
            f"{name} takes {median(found):.2f} [{min(found):.2f}, {max(found):.2f}] times as long"
            for name, found in result["ratios"].get(run, {}).items()
        ]
        print("; ".join([f"{run}: {median(each):.3f} s", *told]))
    if config.out:
        write_json({"config": to_json(config), **result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
