"""How much of its attention a frame that is being denoised gives to earlier frames.

Weights are summed block by block in float32 from queries and keys: no matrix of all weights is ever
held. Source: paper, section 5.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scd.models.flow import SamplingConfig
from scd.probing.subject import CONTEXT, Look, Progress, Subject, Task, silent
from scd.probing.trajectory import denoise, step_times

MAX_BLOCK_BYTES = 64 * 2**20
"""Weights that are held at once; a block has one query at least."""


@dataclass(frozen=True, kw_only=True)
class AttentionMass:
    """Shares of attention, averaged over queries, clips and draws of noise.

    Distances count frames backwards: 0 is the frame itself. The shares of all distances and of the
    context add up to 1.
    """

    layers: tuple[int, ...]
    """Number of each layer, from 1."""
    past_mass: Float[np.ndarray, "layers k steps"]
    """Share of earlier frames, at each step; that of a layer which runs once per frame is the same
    at all steps, and counts the frames before the newest known one."""
    uniform: Float[np.ndarray, " layers"]
    """What `past_mass` would be if all visible keys weighed the same: (i - 1) / i for frame i."""
    context_mass: Float[np.ndarray, "layers k steps"]
    """Share of a separable decoder's context, which is no frame; 0 elsewhere."""
    profile: Float[np.ndarray, "layers k frames"]
    """Share of each distance, averaged over steps."""
    maps: Float[np.ndarray, "layers frames chosen rows columns"]
    """Weights that chosen tokens of the first clip give to each token of each distance, averaged
    over heads, at the middle step."""
    chosen: tuple[int, ...]
    """Tokens of the maps, by row and column, from 0."""


@torch.no_grad()
def attention_mass(
    subject: Subject,
    task: Task,
    sampling: SamplingConfig,
    chosen: Sequence[int] | None = None,
    max_block_bytes: int = MAX_BLOCK_BYTES,
    progress: Progress = silent,
) -> AttentionMass:
    """Measure every layer and head at every step of a trajectory.

    Args:
        subject: what is probed.
        task: frames and their noise.
        sampling: steps of the trajectory.
        chosen: tokens for the maps, from 0; None: that in the middle of the frame.
        max_block_bytes: weights that are held at once.
        progress: told how far it is.

    Raises:
        ValueError: a layer's attention cannot be seen, no layer looks at earlier frames at all,
            fewer than two steps, or tokens that a frame has not.
    """
    times = step_times(sampling)
    chosen = chosen_tokens(subject, chosen)
    counter = _Counter(subject, task.num_past, len(times) - 1, chosen, max_block_bytes)
    # What runs once per frame is the same at all steps; what comes last in `begin` counts.
    with subject.watch_attention(counter.see):
        state = task.begin(subject)
    counter.begun = True
    with subject.watch_attention(counter.see):
        for step, _ in enumerate(denoise(subject, state, task.noise, times)):
            counter.step = step + 1
            progress((step + 1) / (len(times) - 1))
    return counter.result()


def chosen_tokens(subject: Subject, chosen: Sequence[int] | None) -> list[int]:
    """Return the tokens for the maps, from 0; None: that in the middle of the frame.

    Raises:
        ValueError: none, or tokens that a frame has not.
    """
    rows, columns = subject.grid
    if chosen is None:
        return [rows // 2 * columns + columns // 2]
    if not chosen or not all(0 <= token < subject.tokens_per_frame for token in chosen):
        raise ValueError(
            f"tokens lie in 0 .. {subject.tokens_per_frame - 1}, one or more, got {list(chosen)}"
        )
    return list(chosen)


class _Counter:
    """Gathers the shares of all attentions: `see` each look, then `result`."""

    def __init__(
        self,
        subject: Subject,
        num_past: int,
        num_steps: int,
        chosen: Sequence[int],
        max_block_bytes: int,
    ) -> None:
        layers, heads = len(subject.layers), subject.num_heads
        self.subject, self.chosen = subject, list(chosen)
        self.max_block_bytes, self.num_steps = max_block_bytes, num_steps
        # Distances 0 .. num_past, one more for an encoder's start frame, and the context last.
        self.num_classes = num_past + 3
        self.shares = torch.zeros(layers, heads, num_steps, self.num_classes)
        self.uniform = torch.zeros(layers)
        self.maps = torch.zeros(layers, self.num_classes, len(self.chosen), *subject.grid)
        self.seen: set[int] = set()
        self.step, self.begun = 0, False

    def see(self, look: Look) -> None:
        """Add up one attention."""
        layer = self.subject.layers[look.layer]
        if layer.once == self.begun:
            return
        classes = torch.tensor(look.distances)
        if int(classes.max()) > self.num_classes - 2:
            raise ValueError(f"a key of {layer.name} lies {int(classes.max())} frames back")
        classes = classes.where(classes != CONTEXT, self.num_classes - 1)
        members = torch.zeros(len(classes), self.num_classes)
        members[torch.arange(len(classes)), classes] = 1
        shares = mass(look, members.to(look.q.device), self.max_block_bytes).mean(0).cpu()
        steps = slice(None) if layer.once else slice(self.step, self.step + 1)
        self.shares[look.layer, :, steps] = shares[:, None]
        self.seen.add(look.layer)
        if self.step in (0, self.num_steps // 2):
            self.uniform[look.layer] = _uniform(look.bias, members[:, 1:-1].sum(1))
            self._map(look, classes)

    def _map(self, look: Look, classes: Tensor) -> None:
        bias = _rows(look.bias, self.chosen)
        logits = _logits(look.q[:1, :, self.chosen], look.k[:1], None if bias is None else bias[:1])
        weights = logits.softmax(-1)[0].mean(0).cpu()
        for one in classes.unique().tolist():
            of_frame = weights[:, classes == one]
            if of_frame.shape[1] == self.subject.tokens_per_frame:
                self.maps[look.layer, one] = of_frame.unflatten(1, self.subject.grid)

    def result(self) -> AttentionMass:
        """Return what was gathered."""
        names = [layer.name for layer in self.subject.layers]
        missing = [name for place, name in enumerate(names) if place not in self.seen]
        if missing:
            raise ValueError(
                f"no attention over frames was seen in {', '.join(missing)}: it must go through "
                "PyTorch's fused kernel, or the subject's own watch_attention show it"
            )
        past = self.shares[..., 1:-1].sum(-1)
        if not (past > 0).any():
            raise ValueError("no layer of this model looks at earlier frames: nothing to measure")
        used = max(2, 1 + int((self.shares[..., :-1] > 0).flatten(0, 2).any(0).nonzero().max()))
        return AttentionMass(
            layers=tuple(range(1, len(names) + 1)),
            past_mass=past.numpy(),
            uniform=self.uniform.numpy(),
            context_mass=self.shares[..., -1].numpy(),
            profile=self.shares[..., :used].mean(2).numpy(),
            maps=self.maps[:, :used].numpy(),
            chosen=tuple(self.chosen),
        )


def mass(
    look: Look, members: Float[Tensor, "s classes"], max_block_bytes: int = MAX_BLOCK_BYTES
) -> Float[Tensor, "b k classes"]:
    """Sum the weights of the keys of each class, averaged over queries.

    Args:
        look: queries and keys.
        members: 1 where a key belongs to a class.
        max_block_bytes: weights that are held at once.
    """
    batch, heads, num_queries = look.q.shape[:3]
    size = max(1, max_block_bytes // (4 * batch * heads * look.k.shape[2]))
    total = look.q.new_zeros(batch, heads, members.shape[1], dtype=torch.float32)
    for block in _blocks(num_queries, size):
        logits = _logits(look.q[:, :, block], look.k, _rows(look.bias, block))
        total += (logits.softmax(-1) @ members).sum(2)
    return total / num_queries


def _uniform(bias: Tensor | None, past: Float[Tensor, " s"]) -> float:
    """Return the share of past keys among those that a query may see, averaged over queries."""
    if bias is None:
        return float(past.mean())
    seen = (bias > float("-inf")).float().cpu()
    return float(((seen @ past) / seen.sum(-1)).mean())


def _blocks(num: int, size: int) -> Iterator[list[int]]:
    for start in range(0, num, size):
        yield list(range(start, min(start + size, num)))


def _rows(bias: Tensor | None, rows: list[int]) -> Tensor | None:
    return bias if bias is None or bias.shape[-2] == 1 else bias[:, :, rows]


def _logits(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT
    return logits if bias is None else logits + bias.float()
