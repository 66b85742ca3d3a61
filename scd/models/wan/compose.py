"""Which weight of a dense Wan model becomes which of a separable one, and back.

Source: paper, section 6.1: the encoder is the first layers, the decoder the first and the last.
"""

from __future__ import annotations

import re

from scd.models.wan.config import WanSeparableConfig


def places_of(name: str, num_layers: int, config: WanSeparableConfig) -> list[str]:
    """Return the names under which a weight of the dense model lies in the separable one.

    Both parts have embedders of their own, equal at first; a layer may lie in both, in one, or in
    none.
    """
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        is_head = name.startswith("proj_out.") or name == "scale_shift_table"
        return [f"decoder.{name}"] if is_head else [f"encoder.{name}", f"decoder.{name}"]
    layer, rest = int(found[1]), found[2]
    places = [f"encoder.blocks.{layer}.{rest}"] if layer < config.encoder.num_layers else []
    for place, own in enumerate(decoder_layers(num_layers, config)):
        if own == layer:
            places.append(f"decoder.blocks.{place}.{rest}")
    return places


def decoder_layers(num_layers: int, config: WanSeparableConfig) -> list[int]:
    """Return the layers of the dense model, from 0, that the decoder is made of."""
    first, last = config.decoder.num_first, config.decoder.num_last
    return [*range(first), *range(num_layers - last, num_layers)]
