"""Which tensors the file of a session of one world and engine has, and of which shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableState
from scd.serving.records import SessionRecord, bad
from scd.serving.tensors import Entry
from scd.streaming.rollout import Rollout
from scd.streaming.steering import nothing

Place = tuple[World, Engine, int | None]
"""Where a session goes on: world, engine, and frames in memory (None: as trained)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the tensors of a session of one world and engine are, as its head must say."""

    dtype: torch.dtype
    """Of all but the pictures."""
    keys: tuple[int, int, int]
    """Of a KV cache: layers, heads, and size of one."""
    tokens: int
    """Of a frame."""
    window: int
    """Frames of a full KV cache."""
    num_sinks: int
    """First frames whose keys are kept a second time."""
    is_separable: bool
    """Whether a stream keeps its newest frame, too."""
    latent: tuple[int, ...]
    """Shape of a frame as the model makes it."""
    picture: tuple[int, ...]
    """Shape of a given frame."""
    text: tuple[int, int] | None
    """Shape of a text; None: none steers the world."""
    is_video: bool
    """Whether a latent frame does not tell its pictures."""
    kept: Mapping[int, Mapping[str, Tensor]]
    """What a stream remembers beside its KV cache after so many frames; after more as after the
    most. Without numbers."""
    max_start: int
    """Given frames."""

    @staticmethod
    def of(place: Place, max_start: int) -> Layout:
        """Look at a stream that has just begun."""
        world, engine, window = place
        rollout = Rollout(world, None, None, 0, window, engine)
        begin_blank(rollout, 0 if engine.config.conditions.num_labels else None)
        cache: KVCache = rollout.state.cache
        layers, _, heads, _, head_dim = cache.keys.shape
        spec, is_video = engine.config.conditions, world.autoencoder.config.is_video
        return Layout(
            dtype=engine.dtype,
            keys=(layers, heads, head_dim),
            tokens=cache.tokens_per_frame,
            window=cache.config.window,
            num_sinks=cache.config.num_sinks if cache.config.rebase_sinks else 0,
            is_separable=isinstance(rollout.state, SeparableState),
            latent=tuple(engine.shape.shape),
            picture=(world.card.height, world.card.width, 3),
            max_start=max_start,
            text=(spec.text_length, spec.text_dim) if spec.has_text else None,
            is_video=is_video,
            kept=_kept_of(rollout) if is_video or spec.has_text else {},
        )

    def check(self, record: SessionRecord, tensors: Mapping[str, Entry | Tensor]) -> None:
        """Refuse a file of other tensors than a session of its numbers has.

        Raises:
            ServeError: bad_snapshot.
        """
        wanted = self._wanted(record)
        found = {name: (entry.dtype, tuple(entry.shape)) for name, entry in tensors.items()}
        start = found.pop("start", None)
        if start is not None:
            (dtype, shape), most = start, self.max_start
            fits = shape[1:] == self.picture and 1 <= shape[0] <= most if shape else False
            if dtype != torch.uint8 or not fits:
                raise bad(
                    f"start must be bytes of shape [t, *{self.picture}] with 1 to {most} frames, "
                    f"got {dtype} of shape {shape}"
                )
        for name in wanted.keys() | found.keys():
            if wanted.get(name) != found.get(name):
                raise bad(f"{name[:80]} must be {_said(wanted, name)}, got {_said(found, name)}")

    def _wanted(self, record: SessionRecord) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        streams = {"live": record.live}
        streams |= {f"copy.{index}": copy for index, copy in enumerate(record.copies)}
        batch = 2 if record.state.guidance.kind == "conditions" else 1
        layers, heads, head_dim = self.keys
        shapes: dict[str, tuple[int, ...]] = {}
        others: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for prefix, cache in streams.items():
            if len(cache.slots) > self.window:
                raise bad(f"{prefix} has {len(cache.slots)} frames, its window is {self.window}")
            filled = len(cache.slots) * self.tokens
            for name in ("keys", "values"):
                shapes[f"{prefix}.{name}"] = (layers, batch, heads, filled, head_dim)
            if cache.num_evicted and self.num_sinks:
                sinks = self.num_sinks * self.tokens
                shapes[f"{prefix}.sink_keys"] = (layers, batch, heads, sinks, head_dim)
            if self.is_separable:
                shapes[f"{prefix}.newest"] = (batch, min(cache.num_frames, 1), *self.latent)
            others |= self._kept(f"{prefix}.kept.", cache.num_frames)
        if record.frames:
            shapes["latents"] = (len(record.frames), *self.latent)
            if self.is_video:
                others["pictures"] = torch.uint8, (len(record.frames), *self.picture)
        if self.text is not None:
            others["texts"] = torch.float32, (record.num_texts, *self.text)
        elif record.num_texts:
            raise bad("the snapshot has texts, which do not steer this world")
        return {name: (self.dtype, shape) for name, shape in shapes.items()} | others

    def _kept(self, prefix: str, num_frames: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return what a stream of so many frames remembers beside its KV cache."""
        if not self.kept:
            return {}
        wanted = {}
        for name, one in self.kept[min(max(num_frames, min(self.kept)), max(self.kept))].items():
            # All but the decoder's has an axis of the frames in the window.
            frames = () if name.startswith("decoder.") else (min(num_frames, self.window),)
            shape = (*one.shape[:1], *frames, *one.shape[1 + len(frames) :])
            wanted[prefix + name] = one.dtype, shape
        return wanted


NUM_KEPT = 3
"""Frames after which what a decoder remembers has the shapes that it keeps."""


def _kept_of(rollout: Rollout) -> dict[int, dict[str, Tensor]]:
    """Let a stream that has just begun see frames of nothing; return what it remembers, by their
    number."""
    engine, found = rollout.engine, {rollout.num_frames: _shapes(rollout.remembered())}
    spec = engine.config.conditions
    action = nothing(spec)[None] if spec.has_actions else None
    for _ in range(NUM_KEPT):
        latent = torch.zeros(1, *engine.shape.shape, dtype=engine.dtype, device=engine.device)
        rollout.replay(latent, action)
        found[rollout.num_frames] = _shapes(rollout.remembered())
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _said(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], name: str) -> str:
    if name not in tensors:
        return "absent"
    dtype, shape = tensors[name]
    return f"{dtype} of shape {shape}"


def begin_blank(
    rollout: Rollout, label: int | None, text: Tensor | None = None, null_text: Tensor | None = None
) -> None:
    """Begin a stream whose past is of no interest."""
    world, engine = rollout.world, rollout.engine
    labels = None if label is None else torch.tensor([label])
    frames = actions = None
    if engine.needs_first_frame:
        spec = engine.config.conditions
        frames = torch.zeros(1, 1, 3, world.card.height, world.card.width)
        if spec.has_actions:
            actions = nothing(spec)[None, None]
    text = no_text(engine.config.conditions) if text is None else text
    conditions = Conditions(actions=actions, labels=labels, text=text, null_text=null_text)
    rollout.begin(frames, conditions, can_reset=False, from_nothing=True)


def no_text(spec: ConditionSpec) -> Tensor | None:
    """Return a text without words [1 l c], as it is filled up; None: no text steers a model."""
    return torch.zeros(1, spec.text_length, spec.text_dim) if spec.has_text else None
