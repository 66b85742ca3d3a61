"""Layers of a running network, recorded, replaced and left out, without a change of its code.

A layer is any module whose `forward` takes tokens first. Within a with-block its `forward` is
another function; afterwards the module is as it was. Its attention is read by a torch function
mode, which every call of PyTorch's fused kernel goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def no_change(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the tokens as they came: the identity, as the `forward` of a layer."""
    return tokens


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One residual layer of a network, as the probe knows it."""

    name: str
    """How reports call it; numbers in names begin at 1."""
    block: nn.Module
    """The module. Its `forward` takes tokens [b ... d] as the first positional argument and returns
    tokens, or a tuple that begins with them. Those of the newest frame are the last ones."""
    once: bool = False
    """Whether it runs once per frame and not at every denoising step, as a separable encoder."""
    identity: Callable[..., Any] = no_change
    """What stands in for `forward` where the layer is left out. It needs to be given only for a
    layer that returns a tuple, or fewer tokens than it is given."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Input and output of a layer's last call."""

    tokens: Float[Tensor, "b *n d"]
    output: Any
    """What it returned: tokens, or a tuple that begins with them."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention of a layer, as it reached the fused kernel; see `attention_through`."""

    layer: int
    """Place of the layer in the list, from 0."""
    q: Float[Tensor, "b k s e"]
    """Queries, scaled so that the logits are q k / sqrt(e)."""
    k: Float[Tensor, "b k s2 e"]
    v: Float[Tensor, "b k s2 e"]
    bias: Float[Tensor, "#b #k #s s2"] | None
    """Added to the logits, minus infinity where a key is hidden; None: nothing."""

    def attend(self) -> Float[Tensor, "b k s e"]:
        bias = None if self.bias is None else self.bias.to(self.q.dtype)
        return functional.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=bias)


def tokens_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def with_tokens(output: Any, tokens: Tensor) -> Any:
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def newest(tokens: Float[Tensor, "b *n d"], tokens_per_frame: int) -> Float[Tensor, "b n2 d"]:
    """Return the tokens of the newest frame: the last ones."""
    return tokens.flatten(1, -2)[:, -tokens_per_frame:]


@contextmanager
def replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let another function be the `forward` of a module."""
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


@contextmanager
def _all_replaced(
    layers: Sequence[Layer], forward_of: Callable[[int, Layer], Callable[..., Any]]
) -> Iterator[None]:
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.enter_context(replaced(layer.block, forward_of(place, layer)))
        yield


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[dict[int, Call]]:
    """Keep a copy of what the last call of each layer was given and returned.

    Yields:
        The calls by place in `layers`; empty until a layer has run.
    """
    calls: dict[int, Call] = {}

    def recorder(place: int, layer: Layer) -> Callable[..., Any]:
        forward = layer.block.forward

        def run(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = tokens.clone()
            output = forward(tokens, *args, **kwargs)
            # Copies: whoever reads the output next may add to it in place.
            kept = with_tokens(output, tokens_of(output).clone())
            calls[place] = Call(tokens=given, output=kept)
            return output

        return run

    with _all_replaced(layers, recorder):
        yield calls


def without(layers: Sequence[Layer]) -> AbstractContextManager[None]:
    """Leave layers out: their tokens pass through unchanged and nothing is computed."""
    return _all_replaced(layers, lambda place, layer: layer.identity)


def held(layers: Sequence[Layer], calls: Sequence[Call]) -> AbstractContextManager[None]:
    """Let layers return what they returned in recorded calls; nothing is computed in them."""

    def constant(place: int, layer: Layer) -> Callable[..., Any]:
        output = calls[place].output
        return lambda *args, **kwargs: with_tokens(output, tokens_of(output).clone())

    return _all_replaced(layers, constant)


def change_held(layers: Sequence[Layer], calls: Sequence[Call]) -> AbstractContextManager[None]:
    """Let neighbouring layers add what all of them together added in recorded calls.

    Nothing is computed in them: the last adds the sum of their changes, the others nothing.
    """
    after = tokens_of(calls[-1].output)
    before = calls[0].tokens.flatten(1, -2)
    change = after - before[:, -after.flatten(1, -2).shape[1] :].view_as(after)

    def add(tokens: Tensor, *_: Any, **__: Any) -> Any:
        fresh = tokens.flatten(1, -2)[:, -change.flatten(1, -2).shape[1] :].view_as(change)
        return with_tokens(calls[-1].output, fresh + change)

    def passing(place: int, layer: Layer) -> Callable[..., Any]:
        if place == len(calls) - 1:
            return add
        return lambda tokens, *args, **kwargs: with_tokens(calls[place].output, tokens)

    return _all_replaced(layers, passing)


@contextmanager
def attention_through(
    layers: Sequence[Layer], compute: Callable[[AttentionCall], Tensor]
) -> Iterator[None]:
    """Let a function compute every attention inside the layers.

    Only attention that goes through PyTorch's `scaled_dot_product_attention` is met.

    Args:
        layers: attention outside of them is left alone.
        compute: from an attention to what its queries read [b k s e]; `AttentionCall.attend`
            leaves it as it is.
    """
    running: list[int] = []

    def marked(place: int, layer: Layer) -> Callable[..., Any]:
        forward = layer.block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(place)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

        return run

    with _all_replaced(layers, marked), _KernelMode(running, compute):
        yield


class _KernelMode(TorchFunctionMode):
    def __init__(self, running: list[int], compute: Callable[[AttentionCall], Tensor]) -> None:
        super().__init__()
        self.running, self.compute = running, compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self.running:
            return self.compute(_attention_call(self.running[-1], *args, **kwargs))
        return func(*args, **kwargs)


def _attention_call(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Bring the kernel's arguments into one form; their names are the kernel's."""
    assert dropout_p == 0.0, "a network is probed in eval mode"
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(groups, -3) for part in (key, value))
    if is_causal:
        attn_mask = torch.ones(
            query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
        ).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, device=query.device).masked_fill(
            ~attn_mask, float("-inf")
        )
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    return AttentionCall(layer=layer, q=query, k=key, v=value, bias=attn_mask)
