"""Prompts of a world that a text steers, embedded by the text encoder that lies beside it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.text_encoder import (
    PromptEmbedder,
    TextConfig,
    default_cache,
    refuse_empty,
)
from scd.models.checkpoint import World
from scd.models.shipped import parts_beside


class WorldTexts:
    """What the text encoder makes of prompts, each once; it is loaded for prompts that are new.

    `embed` may be called on one thread while another asks what `known` has.
    """

    def __init__(self, world: World, source: str = "", device: str = "cpu") -> None:
        """Find the text encoder.

        Args:
            world: whose model a text steers.
            source: folder with text_encoder/ and tokenizer/ as diffusers writes them, or its name
                on the hub; empty: where the world says.
            device: where the text encoder runs.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: no text steers the world, or it does not say where its text encoder lies.
        """
        spec = world.card.conditions
        if not spec.has_text:
            raise ValueError("this world is not steered by a text: it takes no prompt")
        beside = "" if world.folder is None else parts_beside(str(world.folder))
        described = world.autoencoder.config
        place = source or beside or (described.source if described.has_text_encoder else "")
        if not place:
            raise ValueError(
                "this world does not say where its text encoder lies: needed the folder that "
                "diffusers wrote"
            )
        cache = default_cache()
        self._dim = spec.text_dim
        self._place = place
        self._embedder = PromptEmbedder(
            place, TextConfig(length=spec.text_length, device=device, cache=cache)
        )
        self._known: dict[str, Float[Tensor, "1 l c"]] = {}
        self._cut: dict[str, str] = {}

    def known(self, prompt: str) -> Float[Tensor, "1 l c"] | None:
        """Return what was made of a prompt, the same tensor every time; None: nothing yet."""
        return self._known.get(prompt)

    def cut(self, prompt: str) -> str:
        """Say what of a known prompt was cut off, being too long; empty: nothing was."""
        return self._cut.get(prompt, "")

    def embed(self, prompt: str) -> Float[Tensor, "1 l c"]:
        """Embed a prompt, which must have words.

        Raises:
            ValueError: it is empty, or the text encoder is not that of the world.
        """
        refuse_empty([prompt])
        return self._embed(prompt)

    def embed_nothing(self) -> Float[Tensor, "1 l c"]:
        """Embed the empty prompt, which guidance leads away from."""
        return self._embed("")

    def _embed(self, prompt: str) -> Tensor:
        found = self._known.get(prompt)
        if found is None:
            found = self._embedder.embed([prompt]).float()
            self._embedder.release()
            if found.shape[-1] != self._dim:
                raise ValueError(
                    f"the text encoder of {self._place} makes {found.shape[-1]} entries of a "
                    f"token, the model reads {self._dim}"
                )
            if cut := self._embedder.cut(prompt):
                self._cut[prompt] = cut
            self._known[prompt] = found
        return found
