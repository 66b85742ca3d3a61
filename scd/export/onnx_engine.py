"""An exported world run by ONNX Runtime in Python: `scd.Rollout(world, engine=OnnxEngine(DIR))`.

So what was exported is held against the model frame by frame, by the same stream.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scd.common.config import from_json
from scd.common.files import read_json
from scd.data.clip import Conditions
from scd.engine.plain import PlainEngine
from scd.export.onnx_world import DESCRIPTION, FORMAT
from scd.models.attention import frame_positions, rotary_table
from scd.models.config import SeparableConfig
from scd.models.embed import ticks_of
from scd.models.encoder import Context
from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableState

try:
    import onnxruntime
except ImportError as error:
    raise ValueError(
        'exported worlds run by onnxruntime: pip install -c constraints.txt -e ".[onnx]"'
    ) from error

HIDDEN = -1e9
"""Added to the logits of what is not seen; not infinity, whose products are not numbers."""


class OnnxEngine(PlainEngine):
    """A stream's model, as graphs of one stream each; those of a batch run one after another."""

    def __init__(self, folder: str | os.PathLike[str], num_threads: int = 1) -> None:
        """Open what `scd export onnx` wrote.

        Args:
            folder: that was written.
            num_threads: of each graph.

        Raises:
            FileNotFoundError: there is none.
            ValueError: of another format, or damaged.
        """
        graphs = Graphs(Path(folder), num_threads)
        self.model: Any = graphs
        self.config, self.shape = graphs.config, graphs.config.shape
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.needs_first_frame = not graphs.config.encoder.start_frame


@dataclass(frozen=True, kw_only=True)
class OnnxContext:
    """What the decoder needs of one frame of each stream."""

    prepared: list[dict[str, np.ndarray]]
    """Of each stream, what is the same in every denoising step."""
    encoded: Context
    """Of the encoder."""
    conditions: Conditions
    """Of this frame."""


class Graphs:
    """The graphs of one world, with a model's calls."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        self.description = read_json(folder / DESCRIPTION, FORMAT)
        where = f"{folder / DESCRIPTION}: model"
        values = {name: v for name, v in self.description["model"].items() if name != "kind"}
        self.config = from_json(SeparableConfig, values, where)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        self._sessions = {
            name: onnxruntime.InferenceSession(
                folder / graph["file"], options, providers=["CPUExecutionProvider"]
            )
            for name, graph in self.description["graphs"].items()
        }

    def run(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one graph; what it does not take is left out, and what is not given hides nothing."""
        about = self.description["graphs"][name]
        inputs = {
            key: given[key] if key in given else np.zeros(kind["shape"], dtype=bool)
            for key, kind in about["inputs"].items()
        }
        outputs: Any = self._sessions[name].run(None, inputs)
        return dict(zip(about["outputs"], outputs, strict=True))

    def begin(
        self, clean: Tensor | None, conditions: Conditions, batch: int, window: int | None
    ) -> SeparableState:
        config, block = self.config, self.config.block
        if window not in (None, config.cache.window):
            raise ValueError(f"the graphs have a window of {config.cache.window}, got {window}")
        if clean is None:
            clean = torch.empty(batch, 0, *config.shape.shape)
        cache = KVCache(
            config.cache,
            block,
            num_layers=config.encoder.num_layers,
            batch=clean.shape[0],
            tokens_per_frame=config.shape.num_tokens,
            like=torch.empty(0),
        )
        # What no frame has been written to is read as well, and hidden.
        cache.keys.zero_()
        cache.values.zero_()
        row = -1 if config.encoder.start_frame else 0
        while row < clean.shape[1] - 1:
            upcoming = conditions.frames(row + 1, row + 2)
            self._extend(cache, clean[:, max(row, 0) : row + 1], upcoming, row)
            cache.advance([row])
            row += 1
        return SeparableState(cache=cache, newest=clean[:, max(row, 0) :], next_position=row)

    def _extend(self, cache: KVCache, newest: Tensor, upcoming: Conditions, row: int) -> Context:
        """Run the encoder for one row of each stream, and write it into the ring."""
        cache.make_room()
        shape, block = self.config.shape, self.config.block
        positions = frame_positions(torch.tensor([row]), shape.rows, shape.columns)
        rotary = rotary_table(positions, block.rotary_axes, block.rotary_theta)
        cosine, sine = (part.numpy() for part in rotary)
        slots = cache.slots + [None] * (self.config.cache.window - len(cache.slots))
        slope = block.distance_bias
        seen = [HIDDEN if slot is None else slope * (slot - row) for slot in slots]
        batch = cache.keys.shape[1]
        blank = torch.zeros(1, *shape.shape)
        rows = [
            self.run(
                "encoder",
                {
                    "frame": (newest[one] if newest.shape[1] else blank).float().numpy(),
                    "is_start": np.array([row == -1]),
                    "cosine": cosine,
                    "sine": sine,
                    "keys": cache.keys[:, one : one + 1].numpy(),
                    "values": cache.values[:, one : one + 1].numpy(),
                    "bias": np.array([*seen, 0.0], dtype=np.float32),
                    **_steering(upcoming, one),
                },
            )
            for one in range(batch)
        ]
        keys, values = (
            torch.from_numpy(np.concatenate([each[name] for each in rows], axis=1))
            for name in ("new_keys", "new_values")
        )
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.write(layer, k, v)
        tokens, scale = (
            torch.from_numpy(np.concatenate([each[name] for each in rows])[:, None])
            for name in ("context", "norm_scale")
        )
        return Context(tokens=tokens, norm_scale=scale)

    def context(
        self, state: SeparableState, conditions: Conditions, noise: Tensor | None = None
    ) -> OnnxContext:
        encoded = self._extend(state.cache, state.newest, conditions, state.next_position)
        state.encoded_for = conditions
        return self._context(encoded, conditions)

    def _context(self, encoded: Context, conditions: Conditions) -> OnnxContext:
        prepared = [
            self.run("prepare", {"context": tokens.numpy(), **_steering(conditions, one)})
            for one, tokens in enumerate(encoded.tokens)
        ]
        return OnnxContext(prepared=prepared, encoded=encoded, conditions=conditions)

    def with_noisy_branch(
        self, context: OnnxContext, strength: float, noise: Tensor
    ) -> OnnxContext:
        encoded = context.encoded
        noisy = self._context(encoded.with_noise(strength, noise), context.conditions)
        return OnnxContext(
            prepared=noisy.prepared + context.prepared,
            encoded=Context(
                tokens=torch.cat([noisy.encoded.tokens, encoded.tokens]),
                norm_scale=torch.cat([encoded.norm_scale, encoded.norm_scale]),
            ),
            conditions=context.conditions.concat(context.conditions),
        )

    def velocity(self, context: OnnxContext, noisy: Tensor, time: Tensor) -> Tensor:
        found = [
            self.run(
                "velocity",
                {
                    "noisy": noisy[one : one + 1].numpy(),
                    "time": time[one : one + 1].float().numpy(),
                    "ticks": ticks_of(time[one : one + 1]).numpy(),
                    **prepared,
                },
            )["velocity"]
            for one, prepared in enumerate(context.prepared)
        ]
        return torch.from_numpy(np.concatenate(found))

    def observe(self, state: SeparableState, clean: Tensor, conditions: Conditions) -> None:
        if state.encoded_for is not conditions:
            self.context(state, conditions)
        state.keep(clean)


def _steering(conditions: Conditions, one: int) -> dict[str, np.ndarray]:
    """Return the inputs by which a frame of one stream is steered."""
    named = {
        "action": conditions.actions,
        "hidden_action": conditions.null_actions,
        "hidden_parts": conditions.null_parts,
        "label": conditions.labels,
        "hidden_label": conditions.null_labels,
    }
    given = {name: v[one : one + 1].numpy() for name, v in named.items() if v is not None}
    # Ids are int64 with us, and int32 in the graphs, as browsers have them.
    return {
        name: value.astype(np.int32) if value.dtype == np.int64 else value
        for name, value in given.items()
    }
