"""Seconds, memory and share of the machine's limit of many configurations: `scd bench`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from scd.bench.card import LimitsOfDevice, RowFile, card, print_card
from scd.bench.case import Case, every_case, names, numbers
from scd.bench.models import Subject, find_subject
from scd.bench.settings import BenchConfig
from scd.bench.streams import TimedStreams
from scd.bench.timing import TIMED, Effort, time_case
from scd.common.config import IN_8_BITS, to_json
from scd.common.memory import OutOfMemory, release
from scd.common.runtime import choose_device, choose_stream_precision, cpu_threads
from scd.models.config import SeparableConfig

DEFAULT_CONTEXTS = "16,64,144,300"
"""Contexts where none are asked for, as far as they fit into the model's window."""

DEFAULT_STEPS = "1,4,10,50"
"""Denoising steps where none are asked for, of models that are not trained."""


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """Time all rows and return them; a row that does not fit into memory leaves the others alone.

    Raises:
        ValueError: something is asked for that does not exist or that a model cannot do (before
            anything is measured); or rows that did not fit (after all others).
        OSError: no such run, or a file that cannot be written.
    """
    with cpu_threads(config.threads):
        return _bench(config)


def _bench(config: BenchConfig) -> list[dict[str, Any]]:
    device = choose_device(config.device)
    effort = Effort(frames=config.frames, seconds=config.seconds)
    cases = cases_of(config)
    for case in cases:
        choose_stream_precision(case.precision, device)
    file = RowFile(config.json, config.append)
    rows, refused = [], []
    try:
        limits, common = LimitsOfDevice(device), card(device, TIMED)
        print_card(common, limits, list(dict.fromkeys(case.precision for case in cases)))
        warm_process(cases, device)
        for case in cases:
            if device.type == "cuda":
                # So that the first frame of each row compiles what it needs.
                torch._dynamo.reset()
            try:
                measured = time_case(case, device, limits.at(case.precision), effort)
            except OutOfMemory as error:
                print(f"scd: {error}", file=sys.stderr, flush=True)
                refused.append(case.title)
                continue
            rows.append(row_of(case, measured, common, limits))
            file.write(rows[-1])
    finally:
        file.close()
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(cases)} rows did not fit into memory: {'; '.join(refused)}"
        )
    return rows


def cases_of(config: BenchConfig) -> list[Case]:
    """Return the rows that are asked for.

    Raises:
        ValueError: unknown words, numbers below 1, or what a model cannot do.
        FileNotFoundError: no such run.
    """
    cases = []
    models, joins = names("model", config.model), names("join", config.join) if config.join else []
    subjects = {model: find_subject(model) for model in models}
    separable = [
        name for name, found in subjects.items() if isinstance(found.config, SeparableConfig)
    ]
    if joins and not separable:
        raise ValueError(f"join has no effect on {config.model}: no model is separable")
    for model in models:
        cases += every_case(
            {
                "model": [model],
                "guidance": names("guidance", config.guidance),
                "precision": names("precision", config.precision),
                "batch": numbers("batch", config.batch),
                "sessions": numbers("sessions", config.sessions),
                "context": _contexts(config.context, subjects[model].config.cache.window),
                "steps": _steps(config.steps, subjects[model]),
                "join": joins if joins and model in separable else [None],
                "engine": names("engine", config.engine),
            }
        )
    return cases


def _contexts(text: str, window: int) -> Sequence[int]:
    if text:
        return numbers("context", text)
    return [c for c in numbers("context", DEFAULT_CONTEXTS) if c <= window] or [window]


def _steps(text: str, subject: Subject) -> Sequence[int]:
    if not text and subject.folder is not None:
        return [subject.sampling.num_steps]
    return numbers("steps", text or DEFAULT_STEPS)


def warm_process(cases: Sequence[Case], device: torch.device) -> None:
    """Run each kind of engine once, tiny, so that no row pays for code that is loaded at first.

    Code is part of a process's memory; on a GPU only tensors are counted.
    """
    if device.type != "cpu":
        return
    kinds = {}
    for case in cases:
        is_separable = isinstance(case.subject.config, SeparableConfig)
        tiny = replace(
            Case(model="toy" if is_separable else "toy-dense", context=4, steps=1),
            engine=case.engine,
            # Which small models do not have.
            precision="bf16" if case.precision in IN_8_BITS else case.precision,
        )
        kinds[tiny.title] = tiny
    for tiny in kinds.values():
        streams = TimedStreams(tiny, device)
        streams.fill()
        streams.frame()
    release()


def row_of(
    case: Case, measured: Mapping[str, Any], common: Mapping[str, Any], limits: LimitsOfDevice
) -> dict[str, Any]:
    """Return a row: the case, what was measured, and what all rows have in common."""
    subject = case.subject
    join = subject.config.decoder.join if isinstance(subject.config, SeparableConfig) else None
    return {
        **asdict(case),
        "join": join,
        "sampling": to_json(case.sampling),
        **measured,
        "limits": asdict(limits.at(case.precision)),
        "note": subject.note,
        **common,
    }
