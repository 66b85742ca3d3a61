"""What each precision of a stream does to a Wan model: relative error after every layer, and last.

    python benchmarks/rounding.py wan-1.3b@64x96 --context 9 --out FILE

takes random weights, or a trained world by its folder, and runs one frame by the fast engine in
float32, then with the same inputs and the same window of keys and values at each other precision.
An error is the root mean square of the difference over that of the float32 values.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from scd.bench.models import find_subject
from scd.bench.streams import fill_window
from scd.common.config import at_least, to_json
from scd.common.memory import release
from scd.common.provenance import provenance, write_json
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.fp8 import Fp8Linear
from scd.engine.open import open_engine
from scd.engine.wan import FastWanSeparable
from scd.models.flow import schedule, with_num_steps
from scd.models.kv_cache import KVCache
from scd.models.wan.config import WanSeparableConfig
from scd.models.wan.separable import WanSeparableDiffuser

PRECISIONS = ("bf16", "int8", "int8 maps", "fp8")
"""That are compared with float32; "int8 maps" has keys and values of the past in bfloat16. fp8 is
for GPUs, and rounds alike on a CPU."""


@dataclass(frozen=True, kw_only=True)
class RoundingConfig:
    """A measurement."""

    model: Annotated[str, tyro.conf.Positional] = "wan-1.3b@64x96"
    """A separable Wan model, as `scd bench --model` takes it."""
    context: int = 9
    """Frames of the full window."""
    steps: int = 4
    """Denoising steps."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        at_least(1, context=self.context, steps=self.steps)


@dataclass(kw_only=True)
class Seen:
    """What one precision computed, in order."""

    layers: dict[str, list[Tensor]] = field(default_factory=dict)
    """Tokens after each layer of a part."""
    velocity: Tensor | None = None
    """Of the first step."""
    frame: Tensor | None = None
    """After all steps."""


def watched(engine: FastWanSeparable, seen: Seen) -> None:
    """Keep what comes out of every block of an engine from now on."""
    for name in ("encoder", "decoder"):
        seen.layers[name] = []
        for block in getattr(engine, name).blocks:
            finish = block.finish

            def kept(*inputs: Any, finish: Any = finish, name: str = name) -> Tensor:
                x = finish(*inputs)
                seen.layers[name].append(x.float().clone())
                return x

            block.finish = kept


@torch.no_grad()
def seen_at(config: RoundingConfig, name: str) -> Seen:
    """Run one frame at a precision, its window full of random keys and values."""
    precision, _, part = name.partition(" ")
    subject, cpu = find_subject(config.model), torch.device("cpu")
    if not isinstance(subject.config, WanSeparableConfig):
        raise ValueError(f"needed a separable Wan model, got {config.model}")
    # Weights that bfloat16 holds exactly, so that all start from the same.
    model = subject.load(cpu, torch.bfloat16).model
    if precision == "fp8":
        # Past the choice of precisions, which leaves it to GPUs.
        assert isinstance(model, WanSeparableDiffuser)
        engine: Any = FastWanSeparable(model.to(torch.bfloat16), free=True, maps=Fp8Linear)
    else:
        engine = open_engine(model, "fast", precision, release=True)
    assert isinstance(engine, FastWanSeparable)
    if part:
        engine.encoder.cache_kind = KVCache
    generator, spec = make_generator(0, "rounding"), subject.config.conditions
    text = torch.randn(1, spec.text_length, spec.text_dim, generator=generator)
    noise = torch.randn(1, *engine.shape.shape, generator=generator)
    conditions = Conditions(text=text.bfloat16().to(engine.dtype))
    state = engine.begin(None, conditions, 1, config.context)
    fill_window(state, engine, generator)
    cache = state.cache
    frames, (num_layers, *shape) = [slot or 0 for slot in cache.slots], cache.keys.shape
    cache.reset()
    for layer in range(num_layers):
        # The same in every type, as if bfloat16 had been kept.
        k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        cache.write(layer, k.to(engine.dtype), v.to(engine.dtype))
    cache.advance(frames)
    seen = Seen()
    watched(engine, seen)
    context = engine.context(state, conditions, noise.to(engine.dtype))
    seen.velocity = engine.velocity(context, noise, torch.ones(1, dtype=torch.float64)).float()
    times = schedule(with_num_steps(subject.sampling, config.steps)).tolist()
    seen.frame = engine.denoise(context, noise, times).float()
    return seen


def error(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None and exact is not None
    return float((found - exact).norm() / exact.norm())


def measure(config: RoundingConfig) -> dict[str, Any]:
    """Return the errors of each precision."""
    exact, errors = seen_at(config, "fp32"), {}
    for precision in PRECISIONS:
        release()
        found = seen_at(config, precision)
        layers = {
            name: [error(*pair) for pair in zip(found.layers[name], wanted, strict=True)]
            for name, wanted in exact.layers.items()
        }
        layers["decoder"] = layers["decoder"][: len(layers["decoder"]) // (1 + config.steps)]
        errors[precision] = {
            **layers,
            "velocity": error(found.velocity, exact.velocity),
            "frame": error(found.frame, exact.frame),
        }
    return errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(RoundingConfig, args=arguments, description=__doc__)
    try:
        errors = measure(config)
    except (ValueError, OSError) as error:
        print(f"rounding.py: {error}", file=sys.stderr)
        return 2
    for part in ("encoder", "decoder"):
        for layer, each in enumerate(zip(*(errors[one][part] for one in PRECISIONS), strict=True)):
            print(f"{part} {layer + 1:2}  " + "  ".join(f"{one:.4f}" for one in each))
    for name in ("velocity", "frame"):
        print(f"{name:10}  " + "  ".join(f"{errors[one][name]:.4f}" for one in PRECISIONS))
    if config.out:
        result = {"config": to_json(config), "errors": errors}
        write_json({**result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
