"""One configuration to be timed, and how lists and words of the command line become some."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from scd.bench.models import Subject, find_subject
from scd.common.config import IN_8_BITS, StreamPrecision, at_least
from scd.common.runtime import STREAM_DTYPES
from scd.models.build import frame_cost
from scd.models.config import EngineKind, GuidanceKind, Join, SamplingConfig
from scd.models.cost import FrameCost, Load
from scd.models.flow import evaluations, schedule


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of one model. Its names are those of a spec: "model=toy engine=fast"."""

    model: str
    """Preset, shape, or folder of a run."""
    engine: EngineKind = "plain"
    """What runs the model."""
    join: Join | None = None
    """Of the decoder; None: the model's own."""
    context: int = 16
    """Frames of the full window."""
    steps: int = 10
    """Denoising steps per frame, with the schedule and solver of a trained world."""
    batch: int = 1
    """Streams that are stepped together."""
    sessions: int = 1
    """Streams that are stepped independently of each other, each at its own step."""
    guidance: GuidanceKind = "none"
    """Branch that frames are pushed away from."""
    precision: StreamPrecision = "fp32"
    """Of weights, memory and products."""

    def __post_init__(self) -> None:
        at_least(
            1, context=self.context, steps=self.steps, batch=self.batch, sessions=self.sessions
        )
        self.check(self.subject)

    @property
    def subject(self) -> Subject:
        """The model."""
        return find_subject(self.model, self.join)

    @property
    def sampling(self) -> SamplingConfig:
        """How a frame is denoised."""
        return replace(self.subject.sampling, num_steps=self.steps)

    @property
    def call_times(self) -> list[float]:
        """Times of the calls of the network for a frame: with most solvers one in each step."""
        times = schedule(self.sampling).tolist()
        return [times[call.index] for call in evaluations(times, self.sampling.solver)]

    @property
    def num_calls(self) -> int:
        """Calls of the network per frame."""
        return len(self.call_times)

    @property
    def title(self) -> str:
        """The case in words, for people."""
        words = [self.model, self.engine, *([self.join] if self.join else []), self.precision]
        words += [f"context {self.context}", f"{self.steps} steps", f"batch {self.batch}"]
        words += [f"guidance {self.guidance}"] if self.guidance != "none" else []
        return ", ".join(words + ([f"{self.sessions} sessions"] if self.sessions > 1 else []))

    def check(self, subject: Subject) -> None:
        """Refuse what the model cannot do.

        Raises:
            ValueError: a context beyond its window, guidance that it cannot give, or another
                number of steps than its schedule lists.
        """
        config = subject.config
        # Refuses another number of steps than a schedule lists.
        replace(subject.sampling, num_steps=self.steps)
        if self.context > config.cache.window:
            raise ValueError(
                f"context {self.context} is longer than the window of {self.model}, "
                f"{config.cache.window} frames"
            )
        if self.context <= config.cache.num_sinks:
            raise ValueError(
                f"context {self.context} leaves no room beside the first frames that "
                f"{self.model} always remembers, {config.cache.num_sinks}"
            )
        if self.precision in IN_8_BITS and (self.engine != "fast" or not config.takes_text):
            raise ValueError(
                f"precision {self.precision} is for the fast engine of Wan models, not for "
                f"{self.model} by the {self.engine} engine"
            )
        if self.sessions > 1 and self.batch > 1:
            raise ValueError(
                f"several sessions have one stream each: got sessions={self.sessions} and "
                f"batch={self.batch}"
            )
        if self.guidance == "context_noise" and not config.is_separable:
            raise ValueError(
                f"guidance context_noise needs a separable model: {self.model} is dense"
            )
        if self.guidance == "conditions" and not config.conditions.is_steered:
            raise ValueError(
                "guidance conditions needs a model with actions, labels or text: "
                f"{self.model} has none"
            )

    def cost(self) -> FrameCost:
        """Count the next frame of all streams."""
        load = Load(
            num_context_frames=self.context,
            batch=self.batch * self.sessions,
            branches=1 if self.guidance == "none" else 2,
            memories=2 if self.guidance == "conditions" else 1,
            bytes_per_value=STREAM_DTYPES[self.precision].itemsize,
        )
        return frame_cost(self.subject.config, load)


WORDS: dict[str, tuple[str, ...]] = {
    "engine": get_args(EngineKind),
    "join": get_args(Join),
    "guidance": get_args(GuidanceKind),
    "precision": get_args(StreamPrecision),
}
"""Values of the fields of a case that are one of some words."""


def make_case(values: Mapping[str, Any]) -> Case:
    """Make a case of words and numbers by field; without steps, a trained world has its own.

    Raises:
        ValueError: an unknown word, or what the model cannot do.
    """
    for name, choices in WORDS.items():
        value = values.get(name)
        if value is not None and value not in choices:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(choices)}")
    values = dict(values)
    if values.get("steps") is None:
        values["steps"] = find_subject(values["model"]).sampling.num_steps
    return Case(**values)


def numbers(name: str, text: str) -> list[int]:
    """Read a list such as "16,64".

    Raises:
        ValueError: it is empty, or an entry is no whole number of 1 or more.
    """
    return [_number(name, word) for word in names(name, text)]


def names(name: str, text: str) -> list[str]:
    """Read a list such as "plain,fast".

    Raises:
        ValueError: it is empty.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError(f"{name} needs one entry or more, got {text!r}")
    return words


def _number(name: str, word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{name} must be whole numbers of 1 or more, got {word!r}")
    return value


def parse_case(spec: str, defaults: Mapping[str, Any]) -> Case:
    """Read a spec: "model=scd-m engine=fast join=prefix", in any order.

    Args:
        spec: words of the form key=value, keys as the fields of Case.
        defaults: of keys that the spec does not name.

    Raises:
        ValueError: a word of another form, an unknown key or value, no model, or a case that the
            model cannot do.
    """
    known = {field.name: field for field in fields(Case)}
    values: dict[str, Any] = dict(defaults)
    given: set[str] = set()
    for word in spec.split():
        key, equals, value = word.partition("=")
        if not equals or not value or key not in known or key in given:
            raise ValueError(
                f"cannot read {word!r} in {spec!r}: words are key=value, once each, of "
                f"{', '.join(known)}"
            )
        given.add(key)
        is_number = key in ("context", "steps", "batch", "sessions")
        values[key] = _number(key, value) if is_number else value
    if "model" not in values:
        raise ValueError(f"{spec!r} names no model: model=... is missing")
    return make_case(values)


def every_case(lists: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Return all combinations of the values of each field, the last field changing fastest."""
    return [
        make_case(dict(zip(lists, values, strict=True)))
        for values in itertools.product(*lists.values())
    ]
