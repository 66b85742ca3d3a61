"""`scd probe`: every measurement of one trained model on held-out clips, its JSON and its page.

Each measurement is written when it is done; after an interruption the same command continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from scd.common.config import differences, to_json
from scd.common.files import read_json, refuse_used, remove_leftovers, take_lock
from scd.common.memory import PeakMemory, check_free, readable
from scd.common.places import in_our_words, refuse_another
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, cpu_threads, refuse_mps
from scd.common.weights import digest_of
from scd.data.clip import Conditions
from scd.engine.open import stream_threads
from scd.evaluation.html import write_page
from scd.models.build import num_parameters
from scd.models.checkpoint import RAW_FILE, load_world, resolve
from scd.models.weights import WEIGHTS_FILE
from scd.probing.doubt import against_mean, warnings_of
from scd.probing.measurement import Measurement, Parts, as_measured, find_measurements
from scd.probing.models import SUBJECTS, subject_of
from scd.probing.plan import Plan, make_plan, memory_needed, open_clips, plan_of
from scd.probing.settings import MeasureConfig, ProbeConfig
from scd.probing.subject import Subject
from scd.streaming.finite import NotFinite

SETTINGS = "settings.json"
"""File of a probe's folder with the settings that all its parts share."""

NOT_CLAIMED = (
    "That similar features are redundant: a later layer may need just their small difference. The "
    "map of feature reuse tests that directly.",
    "That a layer with little effect alone could be left out together with others.",
    "That attention weights show what a layer takes from earlier frames: values count too, and "
    "tokens keep what an earlier layer took from them.",
    "What a split would lose after training. Nothing is trained here: the losses rank splits, and "
    "finetuning reduces them much.",
    "That other clips, other training or another size would show the same: this is one checkpoint. "
    "The intervals say how the numbers vary over clips.",
)
"""Shown at the end of the page."""


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure what is not measured yet, write probe.json and report.html, and return the former.

    Raises:
        FileNotFoundError: no such run or data.
        FileExistsError: the folder holds something else than a probe, or another probe.
        ValueError: data of another kind than the model's, layers or tokens that it has not, fewer
            clips than asked for, or too little memory.
    """
    device = choose_device(config.device)
    refuse_mps(device, "scd probe")
    world = load_world(config.run, config.weights, device)
    source = open_clips(config, world)
    needed = memory_needed(config, subject_of(world.model), config.num_clips, config.context)
    console = _state_memory(needed, device)
    plan = make_plan(config, world, source)
    with cpu_threads(stream_threads(config.threads, world.model.config, config.num_clips)):
        try:
            return _write(plan, Path(config.out), _settings(config), needed, console)
        except NotFinite as error:
            raise NotFinite(f"{config.run}: {error}") from error


def report(
    subject: Subject | nn.Module,
    out: str | os.PathLike[str],
    *,
    clips: Float[Tensor, "b t c h w"],
    conditions: Conditions | None = None,
    config: MeasureConfig | None = None,
    decode: Callable[[Tensor], Tensor] = lambda frames: frames,
) -> dict[str, Any]:
    """Measure a network of one's own as `scd probe` does, write the same files, return probe.json.

    What is measured already in `out`, of the same weights, clips and settings, is not measured
    again.

    Args:
        subject: the network by its adapter; a model of this package as it is.
        out: folder for probe.json, report.html and the parts that are done.
        clips: clean (latent) frames of held-out clips, on the network's device; the last of each is
            denoised, after two others or more.
        conditions: that steer the clips; None: nothing does.
        config: what to measure; None: all.
        decode: from frames [b c h w] as the network has them to pixels in [-1, 1]; by default they
            are pixels.

    Raises:
        FileExistsError: the folder holds something else than a probe, or another probe.
        ValueError: no subject, clips of another shape than its frames', layers or tokens that it
            has not, or too little memory.
    """
    if not isinstance(subject, Subject):
        make = SUBJECTS.get(type(subject))
        if make is None:
            raise ValueError(
                f"needed a Subject, which tells layers and frames of a network, got "
                f"{type(subject).__name__}: docs/probing.md shows one in twenty lines"
            )
        subject = make(subject)
    config = config or MeasureConfig()
    plan = plan_of(config, subject, clips, conditions or Conditions(), decode)
    needed = memory_needed(config, subject, plan.task.num_clips, plan.task.num_past)
    console = _state_memory(needed, clips.device)
    settings = _shared(to_json(config)) | {"weights_hash": _weights_hash(subject)}
    settings["clips_hash"] = _hash([clips, *vars(plan.task.conditions).values()])
    return _write(plan, Path(out), settings, needed, console)


def _state_memory(needed: int, device: torch.device) -> Console:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"memory: {readable(needed)} beside the weights, on {device}")
    check_free("the probe", needed, device)
    return console


def _write(
    plan: Plan, out: Path, settings: dict[str, Any], needed: int, console: Console
) -> dict[str, Any]:
    """Measure, and write probe.json and report.html: of worlds and of networks of others."""
    device = plan.task.clean.device
    measurements = find_measurements()
    asked = {name: one for name, one in measurements.items() if name in plan.config.measurements}
    with _claimed(out, settings):
        peak = PeakMemory(device)
        parts = measure(plan, asked, out / "parts", console)
        result = summarize(plan, asked, parts)
        result["memory"] = {"stated_bytes": needed, "peak_bytes": peak.bytes()}
        result |= {"settings": to_json(plan.config)} | provenance(device)
        write_json(result, out / "probe.json")
        write_report(result, asked, parts, out / "report.html")
    for warning in result["warnings"]:
        console.print(f"warning: {warning}")
    console.print(f"saved {out / 'probe.json'} and {out / 'report.html'}")
    return result


def measure(
    plan: Plan, measurements: Mapping[str, Measurement], folder: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Run measurements, each unless its part is in the folder, and return all parts by name."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Any]] = {}
    for name, measurement in measurements.items():
        path = folder / f"{name}.json"
        kept = _kept(path)
        if kept is not None:
            parts[name] = kept
            console.print(f"{name}: done before")
            continue
        began = time.perf_counter()
        with _bar(name, console) as progress:
            part = measurement.measure(plan, progress)
        part["seconds"] = time.perf_counter() - began
        write_json({"part": part, "digest": _digest(part)}, path)
        parts[name] = part
        console.print(part.get("left_out") or f"{name}: {part['seconds']:.1f} s")
    return parts


def _kept(path: Path) -> dict[str, Any] | None:
    """Return a part that was measured before; None: it is not there, or not as it was written."""
    if not path.is_file():
        return None
    try:
        kept = read_json(path)
        part = kept["part"]
        return part if kept["digest"] == _digest(part) else None
    except (ValueError, LookupError, TypeError):
        return None


def _digest(part: Any) -> str:
    """Return what tells a part from any other, as it is in a file."""
    text = json.dumps(json.loads(json.dumps(part)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def summarize(plan: Plan, measurements: Mapping[str, Measurement], parts: Parts) -> dict[str, Any]:
    result: dict[str, Any] = {"against_mean": against_mean(plan)}
    for name, part in parts.items():
        conclude = measurements[name].conclude
        if conclude is None or "left_out" in part:
            result |= as_measured(part)
        else:
            result |= conclude(plan, parts)
    subject, config = plan.subject, plan.config
    result["warnings"] = warnings_of(result)
    if "proposed_split" in result:
        result["proposed_split"]["is_recommended"] = not result["warnings"]
    network = nn.ModuleList(layer.block for layer in subject.layers)
    return result | {
        "left_out": {name: part["left_out"] for name, part in parts.items() if "left_out" in part},
        "model": {
            "kind": type(subject.module or subject).__name__,
            "parameters": num_parameters(subject.module or network),
            "layers": plan.names,
            "once": [layer.once for layer in subject.layers],
            "width": subject.width,
            "heads": subject.num_heads,
            "tokens_per_frame": subject.tokens_per_frame,
        },
        "measured_on": {
            "clips": plan.task.num_clips,
            "noises_per_clip": config.num_noises,
            "given_frames": plan.task.num_past,
            "steps": config.num_steps,
            "levels": list(plan.levels),
            "sampling": to_json(plan.sampling),
        },
        "seconds": {name: part["seconds"] for name, part in parts.items()},
    }


def write_report(
    result: Mapping[str, Any], measurements: Mapping[str, Measurement], parts: Parts, path: Path
) -> None:
    """Write the page: cards and a section of each measurement that the model allowed."""
    shown = sorted(
        (one.place, name) for name, one in measurements.items() if "left_out" not in parts[name]
    )
    names = [name for _, name in shown]
    write_page(
        "probing/report.html",
        path,
        title="What the layers of a causal video diffuser do",
        result=result,
        cards=[card for name in names for card in measurements[name].cards(result)],
        sections=[
            measurements[name].section(result, parts[name].get("pictures", {})) for name in names
        ],
        memory={key: readable(value) for key, value in result["memory"].items()},
        not_claimed=NOT_CLAIMED,
    )


def _settings(config: ProbeConfig) -> dict[str, Any]:
    folder = resolve(config.run)
    weights = folder / (WEIGHTS_FILE if config.weights == "ema" else RAW_FILE)
    return _shared(to_json(config)) | {"weights_hash": digest_of(weights, "blake2b")}


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all parts of a probe share."""
    free = (
        "out",
        "measurements",
        "device",
        "threads",
        "tolerance",
        "join",
        "frame_steps",
        "strict",
        "run",
    )
    return {key: value for key, value in settings.items() if key not in free}


def _weights_hash(subject: Subject) -> str:
    blocks = [layer.block for layer in subject.layers]
    modules = blocks if subject.module is None else [subject.module, *blocks]
    return _hash(value for module in modules for value in module.state_dict().values())


def _hash(tensors: Iterable[Any]) -> str:
    """Return 32 hexadecimal digits of values; what is no tensor counts by its absence."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        else:
            digest.update(b"-")
    return digest.hexdigest()


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a probe's folder, new or of the same settings, as long as the block runs."""
    path = out / SETTINGS
    if path.is_file():
        there = in_our_words(read_json(path), settings)
        if not isinstance(there, dict):
            raise ValueError(f"{path} holds no settings of a probe: choose another --out")
        refuse_another(out, "probe", differences(there, settings))
    else:
        refuse_used(out, "a probe")
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out / "lock"):
        remove_leftovers(out)
        write_json(settings, path)
        yield


@contextmanager
def _bar(name: str, console: Console) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(name.replace("_", " "), total=1.0)
        yield lambda share: progress.update(task, completed=share)
