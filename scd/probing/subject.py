"""What the probe needs from a causal video diffuser, whoever wrote it, and the task it is given.

Time 0 is clean and 1 is noise; velocity is noise - clean. Layers are counted from 1 wherever a
person reads the number, and stand in lists from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.evaluation.image import Estimate, bootstrap
from scd.models.cost import Sizes
from scd.models.flow import interpolate, velocity_between
from scd.probing.intercept import AttentionCall, Layer, attention_through
from scd.probing.settings import MIN_PAST

CONTEXT = -1
"""Distance of a key that stands for no frame: a token of a separable decoder's context."""

Progress = Callable[[float], None]
"""Called from time to time with the share of a measurement that is done, 0 to 1."""


def silent(share: float) -> None:
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class FrameAttention:
    """Attention of the newest frame's tokens in one layer, before the softmax."""

    layer: int
    """Place of the layer in `Subject.layers`, from 0."""
    q: Float[Tensor, "b k n e"]
    """Queries of the newest frame's tokens; logits are q k / sqrt(e) + bias."""
    k: Float[Tensor, "b k s e"]
    """Keys."""
    bias: Float[Tensor, "#b #k #n s"] | None
    """Added to the logits, minus infinity where a key is hidden; None: nothing."""
    distances: Sequence[int]
    """Of each key: 0 the frame itself, 1 the frame before, ...; CONTEXT: no frame."""


class Subject(ABC):
    """A causal video diffuser that can be probed.

    For each frame: `begin` once, then `velocity` at every step. Whoever writes one for another
    network gives the six fields and these two methods; the rest follows, as long as its attention
    calls PyTorch's fused kernel with the keys of the past in front of those of the frame itself.
    """

    layers: Sequence[Layer]
    """All layers, in the order in which they run."""
    tokens_per_frame: int
    grid: tuple[int, int]
    """Rows and columns of a frame's tokens."""
    frame_shape: tuple[int, int, int]
    """Channels, rows and columns of a (latent) frame."""
    num_heads: int
    width: int
    """Hidden size."""
    window: int | None = None
    """Frames that attention sees at most, the one that is denoised included; None: all."""
    sizes: Sizes | None = None
    """Operations of its parts, where known: what a split would cost is predicted from them."""
    module: nn.Module | None = None
    """The network, if the report is to name it and to count all its parameters; None: the subject
    is named, and the parameters of its layers are counted."""

    @abstractmethod
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> Any:
        """Do all that is done once for the frame after `past`, and return what its steps need.

        The result may be used for any number of calls of `velocity`.

        Args:
            past: clean frames.
            conditions: of these and of the frame after them, t + 1 in all.
        """

    @abstractmethod
    def velocity(
        self, state: Any, noisy: Float[Tensor, "b c h w"], time: float
    ) -> Float[Tensor, "b c h w"]:
        """Run the layers that are not `once`: the velocity of the frame at a time in [0, 1]."""

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Return how many frames back each key of an attention is: `FrameAttention.distances`.

        By default keys are those of whole frames in order, the newest frame last.

        Args:
            layer: place in `layers`, from 0.
            num_queries: of all frames that run together.
            num_keys: of all frames in sight.

        Returns:
            One distance for each key; None: no attention over frames, it is left out.
        """
        frames = num_keys // self.tokens_per_frame
        if frames * self.tokens_per_frame != num_keys or num_queries < self.tokens_per_frame:
            return None
        return [frame for frame in range(frames - 1, -1, -1) for _ in range(self.tokens_per_frame)]

    @contextmanager
    def watch_attention(self, callback: Callable[[FrameAttention], None]) -> Iterator[None]:
        """Call a function with each attention of the newest frame's tokens."""

        def show(call: AttentionCall) -> Tensor:
            of_newest = self._of_newest(call)
            if of_newest is not None:
                callback(of_newest)
            return call.attend()

        with attention_through(self.layers, show):
            yield

    @contextmanager
    def own_frame_only(self, layers: Sequence[int]) -> Iterator[None]:
        """Hide earlier frames from the attention of layers, given by their places from 0."""
        chosen = [self.layers[layer] for layer in layers]

        def narrow(call: AttentionCall) -> Tensor:
            distances = self.key_distances(layers[call.layer], call.q.shape[-2], call.k.shape[-2])
            if distances is None or max(distances) <= 0:
                return call.attend()
            own = torch.tensor([distance <= 0 for distance in distances], device=call.k.device)
            return replace(
                call,
                k=call.k[..., own, :],
                v=call.v[..., own, :],
                bias=None if call.bias is None else call.bias[..., own],
            ).attend()

        with attention_through(chosen, narrow):
            yield

    def _of_newest(self, call: AttentionCall) -> FrameAttention | None:
        distances = self.key_distances(call.layer, call.q.shape[-2], call.k.shape[-2])
        if distances is None:
            return None
        bias = call.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., -self.tokens_per_frame :, :]
        q = call.q[..., -self.tokens_per_frame :, :]
        return FrameAttention(layer=call.layer, q=q, k=call.k, bias=bias, distances=distances)

    @property
    def stepped(self) -> list[int]:
        """Places, from 0, of the layers that run at every step."""
        return [place for place, layer in enumerate(self.layers) if not layer.once]

    def places(self, numbers: Sequence[int] | None) -> list[int]:
        """Turn numbers of layers, from 1, into places, from 0; None: all layers.

        Raises:
            ValueError: there is no such layer, or one is named twice.
        """
        if numbers is None:
            return list(range(len(self.layers)))
        wrong = [number for number in numbers if not 1 <= number <= len(self.layers)]
        if wrong or len(set(numbers)) != len(numbers) or not numbers:
            raise ValueError(
                f"layers must be different numbers in 1 .. {len(self.layers)}, got {list(numbers)}"
            )
        return [number - 1 for number in numbers]

    def tokens(self, chosen: Sequence[int] | None) -> list[int]:
        """Return chosen tokens of a frame, from 0; None: the one in the middle.

        Raises:
            ValueError: none, or tokens that a frame has not.
        """
        rows, columns = self.grid
        if chosen is None:
            return [rows // 2 * columns + columns // 2]
        if not chosen or not all(0 <= token < self.tokens_per_frame for token in chosen):
            raise ValueError(
                f"tokens lie in 0 .. {self.tokens_per_frame - 1}, one or more, got {list(chosen)}"
            )
        return list(chosen)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Frames to denoise: the last of each clip, after the ones before it, from given noise.

    With several draws of noise each clip stands several times in a row.
    """

    clean: Float[Tensor, "b t c h w"]
    """Latent frames."""
    conditions: Conditions
    noise: Float[Tensor, "b c h w"]
    """Standard normal, of the last frame."""
    num_noises: int = 1
    """Draws of noise for each clip."""

    def __post_init__(self) -> None:
        num_past = self.clean.shape[1] - 1
        if num_past < MIN_PAST:
            raise ValueError(
                f"the probe needs {MIN_PAST} or more given frames before the one that is "
                f"denoised, got {num_past}"
            )

    @staticmethod
    def of(
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        seed: int = 0,
        num_noises: int = 1,
    ) -> Task:
        """Draw noise for clips; that of a clip depends on the seed, its number and the draw alone.

        Raises:
            ValueError: fewer than one draw, no clips, or clips that are too short.
        """
        if num_noises < 1 or clean.shape[0] < 1:
            raise ValueError(
                f"needed 1 or more clips and draws of noise, got {clean.shape[0]} and {num_noises}"
            )
        noise = torch.stack(
            [
                torch.randn(clean.shape[2:], generator=make_generator(seed, "probe", clip, draw))
                for clip in range(clean.shape[0])
                for draw in range(num_noises)
            ]
        )
        return Task(
            clean=clean.repeat_interleave(num_noises, 0),
            conditions=conditions.repeat(num_noises),
            noise=noise.to(clean.device, clean.dtype),
            num_noises=num_noises,
        )

    @property
    def frame(self) -> Float[Tensor, "b c h w"]:
        return self.clean[:, -1]

    @property
    def num_past(self) -> int:
        return self.clean.shape[1] - 1

    @property
    def num_clips(self) -> int:
        return self.clean.shape[0] // self.num_noises

    @torch.no_grad()
    def begin(self, subject: Subject) -> Any:
        return subject.begin(self.clean[:, :-1], self.conditions)

    def at(self, time: float) -> Float[Tensor, "b c h w"]:
        """Return the noisy frame at a time, on the straight path from the true one to the noise."""
        return interpolate(self.frame, self.noise, self.frame.new_full(self.frame.shape[:1], time))

    @torch.no_grad()
    def error(self, subject: Subject, state: Any, time: float) -> Float[Tensor, " b"]:
        """Return the mean squared error of the velocity at a time, of each clip and draw."""
        velocity = subject.velocity(state, self.at(time), time)
        true = velocity_between(self.frame, self.noise)
        return (velocity.float() - true.float()).square().mean(dim=(-3, -2, -1))

    def per_clip(self, values: Float[Tensor, "*r b"]) -> Float[Tensor, "*r b2"]:
        """Average over the draws of noise of each clip."""
        return values.unflatten(-1, (-1, self.num_noises)).mean(-1)


def losses(
    subject: Subject, task: Task, levels: Sequence[float], state: Any = None
) -> Float[Tensor, "levels b"]:
    """Return the loss of each clip at each time, averaged over its draws of noise.

    Args:
        state: of `task.begin`; None: it is begun here.
    """
    state = task.begin(subject) if state is None else state
    return task.per_clip(torch.stack([task.error(subject, state, time) for time in levels]))


def relative(changed: Float[Tensor, "levels b"], full: Float[Tensor, "levels b"]) -> Estimate:
    """Estimate by which share a loss exceeds another on the same clips."""
    both = torch.stack([changed.mean(0), full.mean(0)], dim=1).cpu()
    return bootstrap(both, lambda means: means[:, 0] / means[:, 1] - 1)
