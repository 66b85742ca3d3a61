"""`scd evaluate`: a checkpoint on held-out clips by a protocol, resumable, over processes.

Every unit of work (trial.py) is kept in a folder beside the result until the result is written, so
the same command given again goes on; started by torchrun or accelerate, processes share the units.
Neither changes a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from scd.autoencoders.build import fingerprint
from scd.common.config import differences, to_json
from scd.common.files import file_aside, read_json, take_lock
from scd.common.places import free_place, in_our_words, listed, refuse_another
from scd.common.processes import Processes
from scd.common.provenance import provenance, write_json
from scd.common.published_weights import (
    ALEXNET,
    I3D_PACKAGE,
    LPIPS_HEADS,
    check_weights,
    shipped_heads,
)
from scd.common.runtime import refuse_mps
from scd.common.threads import ThreadChoice
from scd.common.weights import digest_of, save_tensors
from scd.data.source import open_source
from scd.engine.open import LARGE_PRODUCT, largest_product
from scd.evaluation.fvd import KNOWN, Fvd, I3d, cached_i3d, load_i3d
from scd.evaluation.i3d import CONTENT_SHA256, cached_weights
from scd.evaluation.inverse_dynamics import (
    ReadActions,
    TrainedInverseDynamics,
    load_inverse_dynamics,
)
from scd.evaluation.lpips import load_lpips
from scd.evaluation.metrics import AgainstTruth, Drift, Metric, Seams
from scd.evaluation.plots import plot_metrics
from scd.evaluation.predict import TIMED, check_fit, choose_clips, reduced_to, summarize
from scd.evaluation.protocols import CUSTOM, EvaluateConfig, changes_of
from scd.evaluation.report import write_report
from scd.evaluation.trial import Measurement, Trial, measurement
from scd.models.build import num_parameters
from scd.models.checkpoint import RAW_FILE, load_world, resolve, results_folder
from scd.models.flow import with_num_steps
from scd.models.weights import WEIGHTS_FILE

ABOUT_FILE, LOCK_FILE = "about.json", "lock"
"""Files of the folder of parts: all that they depend on, and what is locked while it is written."""

PARTS = ".parts"
"""How the name of that folder ends, instead of the result's .json."""

ENDING = ".safetensors"
"""How the names of parts end."""

PLOTTED = (
    *("psnr", "psnr_gain", "ssim", "lpips"),
    *("sharpness", "control", "control_error", "frechet_own"),
)
"""Metrics of the picture, those that were measured."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An evaluation that can begin: everything is there and fits together."""

    trial: Trial
    reader: TrainedInverseDynamics | None
    """Reads actions back, if it is measured how well."""
    about: dict[str, Any]
    """All that the numbers depend on; a result with the same need not be measured again."""
    short_episodes: list[int]
    """Episodes that were too short for a clip."""


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Measure a checkpoint and write the result, or read the result if it is there.

    Returns:
        The result in the first process, None in the others; `settings` says where it was written.

    Raises:
        FileNotFoundError: no such run, data, inverse dynamics model or weights.
        FileExistsError: another result is at `out`.
        ValueError: weights that are not given or are others, data of another kind or size, too few
            clips, or a folder with parts of another evaluation.
    """
    processes = Processes(config.device)
    refuse_mps(processes.device, "scd evaluate")
    prepared = prepare(config, processes.device)
    out = _place(config, prepared.about)
    config = replace(config, out=str(out))
    # Until all have looked, none may write.
    processes.wait()
    if out.exists():
        finished = _finished(out)
    else:
        parts = Parts(out.with_suffix(PARTS))
        with _choose_threads(config, prepared.trial, processes) as threads:
            prepared = replace(prepared, trial=replace(prepared.trial, threads=threads))
            _measure_units(prepared, parts, processes)
            if processes.rank == 0:
                trial = prepared.trial
                found = measurement(trial, {unit: parts.read(unit.name) for unit in trial.units()})
                finished = write_result(config, prepared, found, processes.device)
                parts.remove()
    processes.wait()
    processes.end()
    return finished if processes.rank == 0 else None


def _finished(out: Path) -> dict[str, Any]:
    """Read a result of before (ValueError: it is not whole)."""
    finished = read_json(out)
    try:
        # It may have been moved.
        finished["settings"]["out"] = str(out)
        readable(finished)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{out} is not a whole result of scd evaluate: remove it, and the same command "
            "measures again"
        ) from error
    return finished


def _choose_threads(config: EvaluateConfig, trial: Trial, processes: Processes) -> ThreadChoice:
    num_clips = min(trial.protocol.batch_size, len(trial.windows))
    return ThreadChoice(
        config.threads,
        active=processes.device.type == "cpu" and processes.number == 1,
        small=largest_product(trial.world.model.config, num_clips) < LARGE_PRODUCT,
    )


def prepare(config: EvaluateConfig, device: torch.device) -> Prepared:
    """Open everything that an evaluation needs, before anything is rolled out."""
    if not config.run or not config.data:
        missing = "--data, the clips to measure on" if config.run else "a RUN: its folder, or --run"
        raise ValueError(f"scd evaluate needs {missing}")
    protocol = config.protocol
    if protocol.from_nothing and config.judge:
        raise ValueError(
            f"--judge has no effect: protocol {protocol.name} gives no frame, and actions are read "
            "back from a frame and the one before it"
        )
    metrics, hashes = open_metrics(config, device)
    reader = load_inverse_dynamics(config.judge, device) if config.judge else None
    world = load_world(config.run, config.weights, device)
    source = open_source(config.data, protocol.split, config.strict)
    check_fit(world, source.card, config.data)
    protocol.check_size(source.card.height, source.card.width, config.data)
    shape = world.model.config.shape
    if shape.num_tokens > 1:
        metrics.append(Seams(protocol, shape.rows, shape.columns))
    if reader is not None:
        reader.check_fit(source.card, config.data)
        metrics.append(ReadActions(protocol, reader))
    protocol = reduced_to(protocol, source)
    windows, short = choose_clips(source, protocol, config.data)
    sampling = with_num_steps(world.sampling, config.num_steps)
    trial = Trial(
        world=world,
        source=source,
        windows=windows,
        protocol=protocol,
        metrics=metrics,
        sampling=sampling,
        guidance=config.guidance,
    )
    file = resolve(config.run) / (WEIGHTS_FILE if config.weights == "ema" else RAW_FILE)
    about = {
        "protocol": to_json(protocol),
        "sampling": to_json(sampling),
        "guidance": to_json(config.guidance),
        "data": config.data,
        "card": to_json(source.card),
        "windows": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "world": digest_of(file, "sha256"),
        "autoencoder": fingerprint(world.autoencoder),
        "weights": hashes,
        "judge": "" if reader is None else reader.digest,
    }
    about = json.loads(json.dumps(about))
    return Prepared(trial=trial, reader=reader, about=about, short_episodes=short)


def open_metrics(
    config: EvaluateConfig, device: torch.device
) -> tuple[list[Metric], dict[str, str]]:
    """Return what a protocol measures, and the hash of each file of weights by its name."""
    protocol, hashes = config.protocol, {}
    for metric, name in (("lpips", "alexnet"), ("fvd", "i3d")):
        wanted, given = getattr(protocol, metric), getattr(config, name)
        if given and not wanted:
            raise ValueError(
                f"--{name} has no effect: protocol {protocol.name} does not measure {metric}; "
                f"--{metric} makes it do so"
            )
    if protocol.lpips and not config.alexnet:
        raise ValueError(
            f"protocol {protocol.name} measures lpips: needed {ALEXNET.described()}. Give its path "
            "by --alexnet, or leave lpips out by --no-lpips, which the result says"
        )
    lpips = None
    if protocol.lpips:
        heads = config.lpips_heads or shipped_heads()
        hashes["alexnet"] = check_weights(config.alexnet, ALEXNET, config.alexnet_sha256)
        hashes["lpips_heads"] = check_weights(heads, LPIPS_HEADS, config.lpips_heads_sha256)
        lpips = load_lpips(config.alexnet, heads, device)
    metrics = [AgainstTruth(protocol, lpips, device), Drift(protocol)]
    if protocol.fvd:
        network, digest = (None, "") if protocol.without_fvd else open_i3d(config, device)
        hashes |= {"i3d": digest} if network else {}
        metrics.append(Fvd(protocol, network))
    return metrics, hashes


def open_i3d(config: EvaluateConfig, device: torch.device) -> tuple[I3d, str]:
    """Return the network of FVD, of a file or else of the cache, and the hash of its weights."""
    protocol = config.protocol
    if config.i3d:
        digest = check_weights(config.i3d, KNOWN[protocol.i3d_kind], config.i3d_sha256)
        return load_i3d(config.i3d, protocol.i3d_kind, device), digest
    if not cached_weights().exists():
        raise ValueError(
            f"protocol {protocol.name} measures fvd: needed {I3D_PACKAGE.described()}. Run "
            "scd weights i3d, or give a TorchScript file by --i3d, or leave fvd out by --no-fvd, "
            "which the result says"
        )
    return cached_i3d(protocol.i3d_kind, device), CONTENT_SHA256


def _place(config: EvaluateConfig, about: Mapping[str, Any]) -> Path:
    """Return where the result is to be, or is already; that of another evaluation is kept."""
    if config.out:
        out = Path(config.out)
        refuse_another(out, "result", _others(out, about))
        return out
    name = config.protocol.name
    stem = "evaluation" if name == CUSTOM else f"evaluation-{name}"
    return free_place(
        results_folder(config.run) / f"{stem}.json",
        lambda path: (
            not _others(path, about) and not _others(path.with_suffix(PARTS) / ABOUT_FILE, about)
        ),
    )


def _others(path: Path, about: Mapping[str, Any]) -> list[str]:
    """List how a result, or the `about` of parts, differs from what is asked for; none: it is the
    same, or not there."""
    if not path.exists():
        return []
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    if path.name != ABOUT_FILE:
        found = found.get("about") if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return ["no result of scd evaluate"]
    return differences(in_our_words(found, about), about)


class Parts:
    """A folder of parts that all depend on the same. Phases: `open`; `missing`, `write`; `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, about: Mapping[str, Any]) -> None:
        """Make the folder, or go on with one whose parts depend on the same (else ValueError)."""
        file = self.folder / ABOUT_FILE
        about = json.loads(json.dumps(about))
        if not file.is_file():
            if self.folder.exists() and any(self.folder.glob(f"*{ENDING}")):
                raise ValueError(f"{self.folder} holds parts, but no {ABOUT_FILE}: remove it")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(about, file)
            return
        try:
            found = read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}: remove {self.folder}") from error
        other = differences(in_our_words(found, about), about)
        if other:
            raise ValueError(
                f"{self.folder} holds parts of another evaluation; then and now: {listed(other)}. "
                "Remove it, or choose another name for the result"
            )

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return the parts that are not there; a damaged one counts as missing, with a warning."""
        return [name for name in names if not self._is_whole(self._file(name))]

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with file_aside(self._file(name)) as aside:
            save_tensors(tensors, aside)

    def read(self, name: str) -> dict[str, Tensor]:
        return load_file(self._file(name))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{ENDING}"

    def _is_whole(self, file: Path) -> bool:
        if not file.is_file():
            return False
        try:
            with safe_open(str(file), framework="pt") as opened:
                return bool(list(opened.keys()))
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged and is measured again: %s", file, error)
            return False


def _measure_units(prepared: Prepared, parts: Parts, processes: Processes) -> None:
    """Share the missing units out among the processes."""
    units = {unit.name: unit for unit in prepared.trial.units()}
    lock = None
    if processes.rank == 0:
        parts.open(prepared.about)
        lock = take_lock(parts.folder / LOCK_FILE)
    processes.wait()
    missing = parts.missing(list(units))
    # A part that one process writes must not yet be counted by another one.
    processes.wait()
    try:
        for name in missing[processes.rank :: processes.number]:
            parts.write(name, prepared.trial.measure(units[name]))
        processes.wait()
    finally:
        if lock is not None:
            lock.close()


def write_result(
    config: EvaluateConfig, prepared: Prepared, found: Measurement, device: torch.device
) -> dict[str, Any]:
    """Write the result, its plot and, of a protocol with a name, its page; return the result."""
    trial, reader, out = prepared.trial, prepared.reader, Path(config.out)
    protocol = trial.protocol
    side_by_side = min(protocol.batch_size, len(trial.windows))
    result = {
        "protocol": protocol.name,
        "changed": changes_of(protocol),
        "rows": found.rows,
        "overall": found.overall,
        "clips": found.clips,
        "left_out": found.left_out,
        "short_episodes": prepared.short_episodes,
        "memory_events": found.memory_events,
        "seconds_per_frame": summarize(found.timings),
        "timed": f"{TIMED}; {side_by_side} clips side by side",
        "model": {
            "kind": type(trial.world.model).__name__,
            "parameters": num_parameters(trial.world.model),
            "sampling": to_json(trial.sampling),
        },
        "weights": prepared.about["weights"],
        "judge": reader and {"digest": reader.digest, "held_out": reader.held_out},
        "about": prepared.about,
        "settings": replace(config, protocol=protocol).as_flags(),
    } | provenance(device)
    measured = {row["metric"] for row in found.rows}
    panels = [metric for metric in PLOTTED if metric in measured]
    title = f"{config.run} on {config.data}"
    if protocol.name != CUSTOM:
        title += f", {protocol.name}"
        write_report(result, trial, found, out.with_suffix(".html"))
    plot_metrics(found.rows, panels, out.with_suffix(".png"), title)
    write_json(result, out)
    return result


def readable(result: Mapping[str, Any]) -> str:
    """Return a table for people: by horizon, or by protocol of all predicted frames together."""
    settings = result["settings"]
    if settings["protocol"] == CUSTOM:
        lines = _by_horizon(result["rows"], settings)
    else:
        lines = [
            f"{result['protocol']}: {settings['num_clips']} clips, {settings['num_trajectories']} "
            f"trajectories each ({settings['trajectories']}), {settings['context']} given and "
            f"{settings['horizon']} predicted frames"
        ]
        lines += [f"changed: {change}" for change in result["changed"]]
        if result["short_episodes"]:
            lines.append(f"left out {len(result['short_episodes'])} episodes that are too short")
        for row in result["overall"]:
            interval = f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
            lines.append(f"{row['metric']:15} {row['baseline']:16} {row['mean']:9.4f} {interval}")
    lines += [f"without {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _by_horizon(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """Show each metric's means at the first, middle and last horizon."""
    last = settings["horizon"]
    horizons = sorted({1, (last + 1) // 2, last})
    clips = f"{settings['num_clips']} clips of {settings['split']}"
    lines = [f"{clips:32}" + "".join(f"{f'+{horizon}':>9}" for horizon in horizons)]
    means = {(row["metric"], row["baseline"], row["horizon"]): row["mean"] for row in rows}
    for metric, baseline in dict.fromkeys((metric, baseline) for metric, baseline, _ in means):
        found = [means.get((metric, baseline, horizon)) for horizon in horizons]
        cells = "".join(" " * 9 if mean is None else f"{mean:9.3f}" for mean in found)
        lines.append(f"{metric:15} {baseline:16}{cells}")
    return lines
