"""Clips of video with actions, and the one place that knows how actions align with frames.

Action i is what was done between frame i-1 and frame i: frame i is the effect of action i on frame
i-1. `actions[0]` led to the first frame from something outside the clip; it is kept because a
stream that begins with that frame still carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from scd.data.given import Frames, as_ids
from scd.data.spaces import ConditionSpec


def check_conditions(
    spec: ConditionSpec, conditions: Conditions, num_frames: int | None = None
) -> None:
    """Refuse (ValueError) what is missing, superfluous, or of other values or sizes.

    There must be `num_frames` actions or more.
    """
    actions, labels = conditions.actions, conditions.labels
    if spec.has_actions and actions is None:
        raise ValueError("this model is steered by actions, but none were given")
    if not spec.has_actions and actions is not None:
        raise ValueError("actions were given, but this model was built without actions")
    if actions is not None:
        check_actions(spec, actions)
        several = spec.actions_per_frame
        if several > 1 and (actions.ndim != 2 + spec.action_axes or actions.shape[2] != several):
            raise ValueError(
                f"a latent frame has {several} actions, of each frame of video that it stands for, "
                f"got actions of shape {list(actions.shape)}"
            )
        if num_frames is not None and actions.shape[1] < num_frames:
            raise ValueError(
                f"{num_frames} frames need {num_frames} actions, got {actions.shape[1]}"
            )
    if bool(spec.num_labels) != (labels is not None):
        raise ValueError(
            f"this model has {spec.num_labels} labels, but labels were "
            + ("given" if labels is not None else "not given")
        )
    if labels is not None:
        _check_ids("label", labels, spec.num_labels)
    for name, text in (("text", conditions.text), ("null_text", conditions.null_text)):
        _check_text(spec, name, text)


def _check_text(spec: ConditionSpec, name: str, text: Tensor | None) -> None:
    if text is None:
        if name == "text" and spec.has_text:
            raise ValueError("this model is steered by an embedded text, but none was given")
        return
    if not spec.has_text:
        raise ValueError(f"a {name} was given, but this model was built without text")
    if text.shape[1:] != (spec.text_length, spec.text_dim):
        raise ValueError(
            f"the {name} must be embedded as [streams, {spec.text_length}, {spec.text_dim}], "
            f"filled up with zeros, got {list(text.shape)}"
        )


def check_actions(spec: ConditionSpec, actions: Tensor) -> None:
    """Refuse actions of another kind, out of range, or not finite (ValueError)."""
    if spec.num_actions:
        if actions.is_floating_point():
            raise ValueError(f"discrete actions are integers, got {actions.dtype}")
        _check_ids("action", actions, spec.num_actions)
    else:
        if not actions.is_floating_point() or actions.shape[-1] != spec.action_dim:
            raise ValueError(
                f"continuous actions are float vectors of {spec.action_dim} entries, "
                f"got {actions.dtype} of shape {tuple(actions.shape)}"
            )
        if not torch.isfinite(actions).all():
            raise ValueError("continuous actions must be finite, got NaN or infinity")
        if spec.action_parts:
            _check_entries(spec, actions)


def by_latent(
    spec: ConditionSpec, actions: Integer[Tensor, "..."] | Float[Tensor, "..."]
) -> Integer[Tensor, "..."] | Float[Tensor, "..."]:
    """Put the actions of frames of video together to those of latent frames.

    The first latent frame stands for one frame of video, whose action is repeated; what is too
    little for a latent frame at the end is left out.

    Args:
        spec: how many actions a latent frame has; 1: they stay as they are.
        actions: of frames of video in a row, [t] or [t a], or of several clips.
    """
    num = spec.actions_per_frame
    if num == 1:
        return actions
    axis = actions.ndim - 1 - bool(spec.action_dim)
    first, rest = actions.narrow(axis, 0, 1), actions.narrow(axis, 1, actions.shape[axis] - 1)
    rest = rest.narrow(axis, 0, rest.shape[axis] // num * num)
    whole = torch.cat([first.repeat_interleave(num, axis), rest], axis)
    return whole.unflatten(axis, (-1, num))


def held(
    spec: ConditionSpec, actions: Integer[Tensor, "b ..."] | Float[Tensor, "b ..."]
) -> Integer[Tensor, "b ..."] | Float[Tensor, "b ..."]:
    """Hold the action of each stream for all frames of video that a latent frame stands for; what
    has several actions already stays as it is."""
    if spec.actions_per_frame == 1 or actions.ndim == 1 + spec.action_axes:
        return actions
    return actions[:, None].expand(-1, spec.actions_per_frame, *actions.shape[1:])


@lru_cache
def _limits(spec: ConditionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each entry of a vector of actions its least and greatest value, and whether it
    counts."""
    limits = torch.tensor([pair for part in spec.action_parts for pair in part.limits])
    return limits[:, 0], limits[:, 1], torch.tensor(spec.counts)


def _check_entries(spec: ConditionSpec, actions: Tensor) -> None:
    """Refuse vectors of actions outside their space (ValueError)."""
    low, high, counts = (values.to(actions.device) for values in _limits(spec))
    wrong = (actions < low) | (actions > high) | (counts & (actions != actions.round()))
    if wrong.any():
        *_, entry = wrong.nonzero()[0].tolist()
        came = actions[..., entry][wrong[..., entry]][0].item()
        kind = "a whole number" if counts[entry] else "a number"
        raise ValueError(
            f"the action's entry {spec.action_names[entry]!r} is {kind} in "
            f"{low[entry].item():g} .. {high[entry].item():g}, got {came:g}"
        )


def _check_ids(name: str, ids: Tensor, num: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num):
        raise ValueError(
            f"{name} ids must lie in 0 .. {num - 1}, got {int(ids.min())} .. {int(ids.max())}"
        )


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What steers each clip of a batch.

    The two `null` masks mark what is hidden from the model, by its null embedding: everything in
    the unconditional branch of guidance, and here and there by condition dropout in training.

    Ids of any integer type become int64 (ValueError: truth values).
    """

    actions: Integer[Tensor, "b t ..."] | Float[Tensor, "b t ... a"] | None = None
    """Action i led from frame i-1 to frame i: ids, or vectors; of a latent frame that stands for
    several frames of video, those of each."""
    labels: Integer[Tensor, " b"] | None = None
    null_actions: Bool[Tensor, "b t"] | None = None
    """Frames whose action is hidden; None: of no frame."""
    null_parts: Bool[Tensor, "b t parts"] | None = None
    """Parts of an action that are hidden while others are seen; None: of no frame."""
    null_labels: Bool[Tensor, " b"] | None = None
    """Clips whose label is hidden; None: of no clip."""
    text: Float[Tensor, "b l c"] | None = None
    """Embedded text of each clip, filled up with zeros."""
    null_text: Float[Tensor, "b l c"] | None = None
    """What stands in for a text that is hidden: the embedded empty, or negative, prompt."""

    def __post_init__(self) -> None:
        for name in ("actions", "labels"):
            ids = getattr(self, name)
            if ids is not None and getattr(ids, "dtype", None) != torch.int64:
                object.__setattr__(self, name, as_ids(ids, name))

    def to(self, device: torch.device | str) -> Conditions:
        return self._map(lambda value: value.to(device, non_blocking=True))

    def frames(self, start: int, stop: int | None) -> Conditions:
        """Return the conditions of frames start .. stop - 1; label and text hold for all."""
        cut = {name: value[:, start:stop] for name, value in self._by_frame.items()}
        return replace(self, **cut)

    @property
    def _by_frame(self) -> dict[str, Tensor]:
        """What is given of each frame."""
        values = {name: getattr(self, name) for name in ("actions", "null_actions", "null_parts")}
        return {name: value for name, value in values.items() if value is not None}

    def with_actions_of(self, other: Conditions) -> Conditions:
        """Return these with what another has of each frame."""
        return replace(self.lasting, **other._by_frame)

    @property
    def lasting(self) -> Conditions:
        """What steers all frames alike."""
        return replace(self, **dict.fromkeys(self._by_frame))

    def split(self, num_frames: int) -> Conditions:
        """Turn b clips of `num_frames` frames into b * num_frames clips of one frame."""

        folded = {
            name: value[:, :num_frames].flatten(0, 1)[:, None]
            for name, value in self._by_frame.items()
        }
        return replace(self.lasting.repeat(num_frames), **folded)

    def repeat(self, num: int) -> Conditions:
        """Repeat each clip's conditions `num` times in a row."""
        return self._map(lambda value: value.repeat_interleave(num, 0))

    def concat(self, other: Conditions) -> Conditions:
        """Put another batch, steered by the same kinds of conditions, behind this one."""
        joined = {
            name: torch.cat([value, getattr(other, name)])
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **joined)

    def with_null_branch(self, parts: Sequence[bool] = ()) -> Conditions:
        """Return twice the batch: everything hidden first, then as it is (for guidance).

        Args:
            parts: of the parts of an action, which are hidden, and nothing else; empty: everything.
        """
        if any(parts):
            if self.actions is None:
                return self.concat(self)
            hidden = torch.tensor(parts, device=self.actions.device)
            hidden = hidden.expand(*self.actions.shape[:2], -1)
            seen = replace(self, null_parts=torch.zeros_like(hidden))
            return replace(self, null_parts=hidden).concat(seen)
        if self.text is not None and self.null_text is None:
            raise ValueError("hiding the text needs null_text, the embedded negative prompt")
        masks = {}
        if self.actions is not None:
            masks["null_actions"] = torch.zeros(
                self.actions.shape[:2], dtype=torch.bool, device=self.actions.device
            )
        if self.labels is not None:
            masks["null_labels"] = torch.zeros_like(self.labels, dtype=torch.bool)
        seen = replace(self, **masks)
        hidden = replace(seen, **{name: ~mask for name, mask in masks.items()})
        return replace(hidden, text=self.null_text).concat(seen)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: change(value) for name, value in given.items()})


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Some consecutive frames of one episode, with the actions that led to them."""

    frames: Float[Tensor, "t c h w"]
    """Pixels in [-1, 1], three channels; or latents of unit scale, where `encoded`."""
    actions: Integer[Tensor, "t ..."] | Float[Tensor, "t ... a"] | None = None
    """Action i led from frame i-1 to frame i; as of `Conditions`."""
    label: int | None = None
    encoded: bool = False
    """Whether the frames are what an autoencoder made of them."""
    text: Float[Tensor, "l d"] | None = None
    """Embedded text of the whole clip, filled up with zeros."""
    null_text: Float[Tensor, "l d"] | None = None
    """What stands in for the text where it is hidden."""
    fps: float = 10.0
    """Frames per second at which the clip is meant to be watched."""

    def __len__(self) -> int:
        return self.frames.shape[0]

    def __getitem__(self, frames: slice) -> Clip:
        return replace(
            self,
            frames=self.frames[frames],
            actions=None if self.actions is None else self.actions[frames],
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips of equal length side by side."""

    frames: Float[Tensor, "b t c h w"]
    """Pixels in [-1, 1], three channels; or latents of unit scale, where `encoded`."""
    conditions: Conditions
    """What steers the clips, frame by frame."""
    encoded: bool = False
    """Whether the frames are what an autoencoder made of them."""

    @staticmethod
    def of(clips: Sequence[Clip]) -> Batch:
        """Stack clips (ValueError: they differ in length, size, or in what steers them)."""
        shapes = sorted({tuple(clip.frames.shape) for clip in clips})
        if len(shapes) != 1:
            raise ValueError(f"clips of one batch need one shape [t, c, h, w], got {shapes}")
        if len({clip.encoded for clip in clips}) != 1:
            raise ValueError("some clips of the batch are pixels and some are latents")
        labels = [None if clip.label is None else torch.tensor(clip.label) for clip in clips]
        return Batch(
            frames=torch.stack([clip.frames for clip in clips]),
            conditions=Conditions(
                actions=_stacked("actions", [clip.actions for clip in clips]),
                labels=_stacked("labels", labels),
                text=_stacked("a text", [clip.text for clip in clips]),
                null_text=_stacked("a null text", [clip.null_text for clip in clips]),
            ),
            encoded=clips[0].encoded,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        return replace(
            self,
            frames=self.frames.to(device, non_blocking=True),
            conditions=self.conditions.to(device),
        )


def _stacked(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
    found = [value for value in values if value is not None]
    if len(found) not in (0, len(values)):
        raise ValueError(f"some clips of the batch have {name} and some have none")
    return torch.stack(found) if found else None


def pixels_to_frames(pixels: Frames) -> Float[Tensor, "*t 3 h w"]:
    """Turn 8-bit RGB pictures [... h w 3] into frames [... 3 h w] in [-1, 1].

    Raises:
        ValueError: pictures of another type or order of axes.
    """
    given = torch.tensor(pixels) if isinstance(pixels, np.ndarray) else pixels
    if given.dtype != torch.uint8 or given.ndim < 3 or given.shape[-1] != 3:
        raise ValueError(
            f"pictures are 8-bit pixels [..., rows, columns, 3], got {given.dtype} "
            f"{list(given.shape)}"
        )
    # In place: these tensors are large and short-lived, and new memory costs as much as the sums.
    return given.movedim(-1, -3).float().div_(127.5).sub_(1)


def frames_to_pixels(frames: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t h w 3"]:
    """Turn frames into 8-bit RGB pictures; values outside [-1, 1] are clipped."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)
