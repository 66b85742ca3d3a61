"""Prompts of sessions: embedded beside the thread that owns the model, before it needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from scd.serving.messages import Beginning, Command, Restart, ServeError, Set
from scd.serving.session import Session
from scd.streaming.texts import WorldTexts

Retry = Callable[[Exception | None], None]
"""Is called when prompts are embedded, or with why they are not."""


class Prompts:
    """What a world's text encoder makes of the prompts of messages.

    The model thread asks which are `missing` and goes on with other calls while one worker thread
    embeds them; `hand_over` lets it take the message up again.
    """

    def __init__(
        self,
        texts: WorldTexts | None,
        default: str,
        hand_over: Callable[[Callable[[], None]], None],
    ) -> None:
        """Prepare; `texts` None: no text steers the world, and nothing is ever missing."""
        self._texts, self.default, self._hand_over = texts, default, hand_over
        self._worker: ThreadPoolExecutor | None = None

    @property
    def are_taken(self) -> bool:
        """Whether a text steers the world."""
        return self._texts is not None

    def missing(self, message: object, session: Session | None) -> list[str]:
        """Return the prompts of a message to a session that are not embedded; the empty one is
        guidance's. A session of a snapshot may have one that nobody has said here."""
        if self._texts is None or not isinstance(message, Command):
            return []
        wanted: list[str | None] = []
        if isinstance(message, Beginning):
            wanted.append(message.prompt or self.default or None)
            if message.guidance is not None and message.guidance.kind == "conditions":
                wanted.append("")
        elif isinstance(message, Set):
            wanted.append(message.prompt)
        elif isinstance(message, Restart) and session is not None:
            wanted.append(session.prompt)
            if session.rollout.guidance.kind == "conditions":
                wanted.append("")
        return [one for one in wanted if one is not None and self._texts.known(one) is None]

    def fetch(self, prompts: list[str], then: Retry) -> None:
        """Embed prompts on the worker thread, then call back on the model thread."""
        self._worker = self._worker or ThreadPoolExecutor(1, "prompts")
        self._worker.submit(self._embed, prompts, then)

    def _embed(self, prompts: list[str], then: Retry) -> None:
        error: Exception | None = None
        try:
            assert self._texts is not None
            for prompt in prompts:
                _ = self._texts.embed(prompt) if prompt else self._texts.embed_nothing()
        except ValueError as wrong:
            error = ServeError("bad_field", f"prompt: {wrong}")
        except Exception as wrong:
            error = wrong
        self._hand_over(lambda: then(error))

    def text(self, prompt: str | None) -> Tensor | None:
        """Return an embedded prompt [1 l c], the same tensor every time; None: of none."""
        return None if self._texts is None or prompt is None else self._texts.known(prompt)

    def cut(self, prompt: str | None) -> str | None:
        """Say what of an embedded prompt was cut off, being too long; None: nothing was."""
        return None if self._texts is None or prompt is None else self._texts.cut(prompt) or None

    @property
    def nothing(self) -> Tensor | None:
        """The embedded empty prompt, once some message has needed it."""
        return self.text("")

    def end(self) -> None:
        """Embed no more."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
