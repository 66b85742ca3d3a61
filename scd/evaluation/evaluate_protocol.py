"""`scd evaluate --protocol NAME`: a checkpoint by a named protocol, resumable, over processes.

Every unit of work (scd/evaluation/trajectories.py) is kept in a folder beside the result until the
result is written, so the same command given again goes on; started by torchrun or accelerate,
processes share the units. Neither changes a number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scd.common.config import to_json
from scd.common.files import read_json, take_lock
from scd.common.processes import Processes
from scd.common.provenance import provenance, write_json
from scd.common.published_weights import ALEXNET, LPIPS_HEADS, check_weights, shipped_heads
from scd.common.weights import digest_of
from scd.data.source import open_source
from scd.evaluation.fvd import KNOWN, load_i3d
from scd.evaluation.image import SSIM_WINDOW
from scd.evaluation.inverse_dynamics import TrainedJudge, load_judge
from scd.evaluation.lpips import load_lpips
from scd.evaluation.plots import plot_metrics
from scd.evaluation.predict import TIMED, check_fit, summarize
from scd.evaluation.protocol_settings import ProtocolConfig
from scd.evaluation.protocols import changes_of, choose_clips
from scd.evaluation.report import write_report
from scd.evaluation.rows import Gathered, clip_values, clips_for_distance, gather, rows_of
from scd.evaluation.trajectories import Instruments, Trial
from scd.evaluation.units import Parts
from scd.models.build import num_parameters
from scd.models.checkpoint import RAW_FILE, load_world, resolve
from scd.models.flow import with_num_steps
from scd.models.pretrained import WEIGHTS_FILE

LOCK_FILE = "lock"
"""File of the folder of parts that is locked while it is written."""

PLOTTED = ("psnr", "psnr_gain", "ssim", "lpips", "sharpness", "control", "control_error")
"""Metrics of the picture, those that were measured."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An evaluation that can begin: everything is there and fits together."""

    trial: Trial
    """What is rolled out and measured."""
    about: dict[str, Any]
    """All that the numbers depend on; a result with the same need not be measured again."""
    short_episodes: list[int]
    """Episodes that were too short for a clip."""


def evaluate_by_protocol(config: ProtocolConfig) -> dict[str, Any] | None:
    """Measure a checkpoint by a named protocol, or read the result if it is there.

    Returns:
        The result in the first process, None in the others.

    Raises:
        FileNotFoundError: no such run, data, judge or weights.
        ValueError: weights that the protocol needs are not given or are others, data of another
            kind or size, fewer clips than the protocol needs, or a folder with parts of another
            evaluation.
    """
    processes = Processes(config.device)
    prepared = prepare(config, processes.device)
    out = Path(config.out)
    finished = _finished(out, prepared.about)
    # Until all have looked, none may write.
    processes.wait()
    if finished is None:
        parts = Parts(out.with_suffix(".parts"))
        _measure_units(prepared, parts, processes)
        if processes.rank == 0:
            gathered = gather({unit: parts.read(unit.name) for unit in prepared.trial.units()})
            finished = write_result(config, prepared, gathered, processes.device)
            parts.remove()
    processes.wait()
    processes.end()
    return finished if processes.rank == 0 else None


def prepare(config: ProtocolConfig, device: torch.device) -> Prepared:
    """Open everything that an evaluation needs, before anything is rolled out.

    Raises:
        FileNotFoundError, ValueError: as `evaluate_by_protocol`.
    """
    for name in ("run", "data"):
        if not getattr(config, name):
            raise ValueError(f"scd evaluate --protocol needs --{name}")
    protocol = config.protocol
    if protocol.from_nothing and config.judge:
        raise ValueError(
            f"--judge has no effect: protocol {protocol.name} gives no frame, and a judge reads "
            "actions back from a frame and the one before it"
        )
    instruments, hashes = open_instruments(config, device)
    world = load_world(config.run, config.weights, device)
    source = open_source(config.data, protocol.split, config.strict)
    check_fit(world, source.card, config.data)
    protocol.check_size(source.card.height, source.card.width, config.data)
    if instruments.judge is not None:
        instruments.judge.check_fit(source.card, config.data)
    windows, short = choose_clips(source, protocol, config.data)
    sampling = with_num_steps(world.sampling, config.num_steps)
    trial = Trial(
        world=world,
        source=source,
        windows=windows,
        protocol=protocol,
        sampling=sampling,
        guidance=config.guidance,
        instruments=instruments,
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
        "weights": hashes,
        "judge": "" if instruments.judge is None else instruments.judge.digest,
    }
    return Prepared(trial=trial, about=json.loads(json.dumps(about)), short_episodes=short)


def open_instruments(
    config: ProtocolConfig, device: torch.device
) -> tuple[Instruments, dict[str, str]]:
    """Return the networks that a protocol measures with, and the hash of each file by its name.

    Raises:
        FileNotFoundError, ValueError: a file that is not given, not there, or another one.
    """
    protocol, hashes = config.protocol, {}
    for metric, name in (("lpips", "alexnet"), ("fvd", "i3d")):
        wanted, given = getattr(protocol, metric), getattr(config, name)
        if given and not wanted:
            raise ValueError(
                f"--{name} has no effect: protocol {protocol.name} does not measure {metric}; "
                f"--{metric} makes it do so"
            )
        if wanted and not given:
            known = ALEXNET if metric == "lpips" else KNOWN[protocol.i3d_kind]
            raise ValueError(
                f"protocol {protocol.name} measures {metric}: needed {known.described()}. Give its "
                f"path by --{name}, or leave {metric} out by --no-{metric}, which the result says"
            )
    lpips = i3d = None
    judge: TrainedJudge | None = load_judge(config.judge, device) if config.judge else None
    if protocol.lpips:
        heads = config.lpips_heads or shipped_heads()
        hashes["alexnet"] = check_weights(config.alexnet, ALEXNET, config.alexnet_sha256)
        hashes["lpips_heads"] = check_weights(heads, LPIPS_HEADS, config.lpips_heads_sha256)
        lpips = load_lpips(config.alexnet, heads, device)
    if protocol.fvd:
        known = KNOWN[protocol.i3d_kind]
        hashes["i3d"] = check_weights(config.i3d, known, config.i3d_sha256)
        i3d = load_i3d(config.i3d, protocol.i3d_kind, device)
    return Instruments(lpips=lpips, i3d=i3d, judge=judge), hashes


def _finished(out: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result that is there already, if it is of the same evaluation."""
    if not out.is_file():
        return None
    try:
        found = read_json(out)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("about") == about else None


def _measure_units(prepared: Prepared, parts: Parts, processes: Processes) -> None:
    """Share the missing units out among the processes and measure them."""
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
    config: ProtocolConfig, prepared: Prepared, gathered: Gathered, device: torch.device
) -> dict[str, Any]:
    """Write the result, its plot and its page, and return the result."""
    trial, protocol, out = prepared.trial, prepared.trial.protocol, Path(config.out)
    discrete = bool(trial.source.card.conditions.num_actions)
    rows, overall = rows_of(gathered, protocol, discrete)
    side_by_side = min(protocol.batch_size, protocol.num_clips)
    judge = trial.instruments.judge
    result = {
        "protocol": protocol.name,
        "changed": changes_of(protocol),
        "rows": rows,
        "overall": overall,
        "clips": clip_values(gathered, trial.windows),
        "left_out": left_out(trial, gathered),
        "short_episodes": prepared.short_episodes,
        "seconds_per_frame": summarize(gathered.timings),
        "timed": f"{TIMED}; {side_by_side} clips side by side",
        "model": {
            "kind": type(trial.world.model).__name__,
            "parameters": num_parameters(trial.world.model),
            "sampling": to_json(trial.sampling),
        },
        "weights": prepared.about["weights"],
        "judge": None if judge is None else {"digest": judge.digest, "held_out": judge.held_out},
        "about": prepared.about,
        "settings": to_json(config),
    } | provenance(device)
    found = {row["metric"] for row in rows}
    panels = [metric for metric in PLOTTED if metric in found]
    title = f"{config.run} on {config.data}, {protocol.name}"
    plot_metrics(rows, panels, out.with_suffix(".png"), title)
    write_report(result, trial, gathered, out.with_suffix(".html"))
    write_json(result, out)
    return result


def left_out(trial: Trial, gathered: Gathered) -> dict[str, str]:
    """Say what could not be measured, and why."""
    found: dict[str, str] = {}
    card = trial.source.card
    if trial.protocol.from_nothing:
        return {"mse, psnr, ssim": "no frame was given, so no frame has one truth"}
    if min(card.height, card.width) < SSIM_WINDOW:
        found["ssim"] = f"frames are smaller than its window of {SSIM_WINDOW} pixels"
    if trial.protocol.shuffled_actions and not trial.with_shuffled:
        found["shuffled_actions"] = "needs actions and two clips"
    features = gathered.of("features")
    if features and len(trial.windows) < clips_for_distance(features):
        needed = clips_for_distance(features)
        found["frechet_own"] = f"needs {needed} clips with this judge, got {len(trial.windows)}"
    return found


def readable(result: Mapping[str, Any]) -> str:
    """Return a table for people: what was measured of all predicted frames together."""
    about = result["settings"]["protocol"]
    lines = [
        f"{result['protocol']}: {about['num_clips']} clips, {about['num_trajectories']} "
        f"trajectories each ({about['trajectories']}), {about['context']} given and "
        f"{about['horizon']} predicted frames"
    ]
    lines += [f"changed: {change}" for change in result["changed"]]
    if result["short_episodes"]:
        lines.append(f"left out {len(result['short_episodes'])} episodes that are too short")
    for row in result["overall"]:
        interval = f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
        lines.append(f"{row['metric']:15} {row['baseline']:16} {row['mean']:9.4f} {interval}")
    lines += [f"without {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)
