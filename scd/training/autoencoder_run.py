"""A training of an autoencoder: its parts and its folder.

    config.json        the TrainAutoencoderConfig of the training
    log.jsonl          what happened
    step_000100/       AutoencoderDC as diffusers reads it, averaged weights, and beside it
        statistics.json    mean and deviation of its latents, channel by channel, measured
        raw.safetensors    the weights that the optimiser moves
        training.pt        optimisers, and the judge of patches
        progress.json      step, number of updates of the averages
    last               names the newest step folder
    held_out.json      how well it reconstructs held-out clips, at the end
    samples/           held-out frames above what becomes of them
    lock               locked by the process that trains here

The folder as a whole is an autoencoder to everybody who is given its name: that of the newest step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scd.autoencoders.diffusers import (
    LAST_FILE,
    WEIGHTS_FILE,
    measure_statistics,
    raw_latents,
    save_network,
)
from scd.common.config import to_json
from scd.common.files import remove_leftovers, take_lock, write_file, written_aside
from scd.common.provenance import command
from scd.common.runlog import RunLog
from scd.common.runtime import choose_device, derive_seed, describe_hardware, git_commit
from scd.data.loader import Loader
from scd.data.source import Source, open_source
from scd.models.build import num_parameters
from scd.models.checkpoint import (
    RAW_FILE,
    Progress,
    guarded,
    keep_newest,
    load_progress,
    load_state,
)
from scd.models.weights import load_weights
from scd.objectives.reconstruct import Distance, PatchJudge
from scd.optim.muon import kernels
from scd.optim.optim import EMA, build_optimizers, parameter_groups
from scd.training.autoencoder_parts import build_network, choose_distance
from scd.training.autoencoder_settings import FREE_FIELDS, TrainAutoencoderConfig
from scd.training.run_folder import LOCK_FILE, goes_on
from scd.training.state import Clock

STATE_FILE = "training.pt"
"""Optimisers and judge, in a step folder."""

MEASURED_FRAMES = 512
"""Frames on which the scale of the latents is measured, at least."""


@dataclass
class AutoencoderRun:
    """All parts of a training that is going on."""

    config: TrainAutoencoderConfig
    """Its settings."""
    folder: Path
    """Where it is kept."""
    lock: TextIO
    """Keeps other processes out of the folder until it is closed."""
    device: torch.device
    """Where it runs."""
    loader: Loader
    """Its batches."""
    held_out: Source
    """Episodes that it does not learn from."""
    network: Any
    """AutoencoderDC, with the weights that the optimiser moves."""
    judge: PatchJudge
    """Of patches; trained in the second part."""
    ema: EMA
    """Averaged weights."""
    optimizers: list[Any]
    """Of the network."""
    judge_optimizers: list[Any]
    """Of the judge."""
    distance: Distance
    """The perceptual one."""
    log: RunLog
    """Its log."""
    clock: Clock
    """Times since the last line of the log."""
    step: int
    """Steps done."""

    @property
    def adversarial(self) -> bool:
        """Whether the first part is over."""
        return self.step >= self.config.reconstruction_steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the network, in eval mode, for the time of a with block."""
        self.network.eval()
        try:
            with self.ema.swap():
                yield
        finally:
            self.network.train()


def start(config: TrainAutoencoderConfig) -> AutoencoderRun:
    """Build all parts of a training, or take up the one in `config.out`.

    Raises:
        ValueError, FileExistsError, OSError: as `train_autoencoder`.
    """
    folder, device = Path(config.out), choose_device(config.device)
    checkpoint = check_folder(config)
    source = open_source(config.data, "train", config.strict)
    held_out = open_source(config.data, "val", config.strict)
    loader = Loader(
        source, config.batch_size, config.num_frames, config.seed, workers=config.num_loader_workers
    )
    distance, named = choose_distance(config, device)
    network = build_network(config, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights of the judge"))
        judge = PatchJudge()
    network, judge = network.to(device).train(), judge.to(device).train()
    progress = Progress(step=0, num_ema_updates=0, num_processes=1, elapsed_s=0.0)
    if checkpoint is not None:
        progress = load_progress(checkpoint)
        load_weights(network, checkpoint / WEIGHTS_FILE, str(device))
    ema = EMA(network, config.ema_decay, progress.num_ema_updates)
    optimizers = _optimizers(network, config, kernels(network))
    judge_optimizers = _optimizers(judge, config, ())
    if checkpoint is not None:
        _restore(checkpoint, network, judge, optimizers, judge_optimizers)
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK_FILE)
    remove_leftovers(folder)
    write_file(folder / "config.json", json.dumps(to_json(config), indent=2))
    log = RunLog(
        folder, total_steps=config.max_steps, first_step=progress.step, tracker=config.tracker
    )
    found = {
        "step": progress.step,
        "device": str(device),
        "parameters": num_parameters(network),
        "perceptual": named,
    }
    log.event("start" if checkpoint is None else "resume", found)
    machine = {"command": command(), "commit": git_commit()} | describe_hardware()
    log.event("machine", machine, show=False)
    return AutoencoderRun(
        config=config,
        folder=folder,
        lock=lock,
        device=device,
        loader=loader,
        held_out=held_out,
        network=network,
        judge=judge,
        ema=ema,
        optimizers=optimizers,
        judge_optimizers=judge_optimizers,
        distance=distance,
        log=log,
        clock=Clock(progress.elapsed_s),
        step=progress.step,
    )


def _restore(
    checkpoint: Path,
    network: nn.Module,
    judge: nn.Module,
    optimizers: list[Any],
    judge_optimizers: list[Any],
) -> None:
    """Take up what a checkpoint holds besides the averaged weights."""
    load_weights(network, checkpoint / RAW_FILE, str(next(network.parameters()).device))
    state = load_state(checkpoint / STATE_FILE)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if "judge" in state:
        judge.load_state_dict(state["judge"])
        for optimizer, saved in zip(judge_optimizers, state["judge_optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def check_folder(config: TrainAutoencoderConfig) -> Path | None:
    """Return the checkpoint to continue from, or None for a new training.

    Raises:
        FileExistsError: `config.out` holds a run with other settings, or no run at all.
        FileNotFoundError: its newest checkpoint is gone.
        ValueError: its settings are damaged.
    """
    if not goes_on(config, FREE_FIELDS):
        return None
    folder = Path(config.out)
    if not (folder / LAST_FILE).is_file():
        return None
    checkpoint = folder / (folder / LAST_FILE).read_text().strip()
    if not (checkpoint / STATE_FILE).is_file():
        raise FileNotFoundError(f"{checkpoint}, which {folder / LAST_FILE} names, is not whole")
    return checkpoint


def _optimizers(
    module: nn.Module, config: TrainAutoencoderConfig, matrices: Iterable[Tensor]
) -> list[Any]:
    groups = parameter_groups(module, [], config.optim, matrices)
    return build_optimizers(groups, config.optim)


def save(run: AutoencoderRun) -> Path:
    """Write a checkpoint, whose latents' scale is measured, and remove old ones.

    Raises:
        ValueError: latents that are not finite.
        OSError: it could not be written; the earlier ones are untouched.
    """
    progress = Progress(
        step=run.step,
        num_ema_updates=run.ema.num_updates,
        num_processes=1,
        elapsed_s=run.clock.total_s,
    )
    state: dict[str, Any] = {"optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
    if run.step > run.config.reconstruction_steps:
        # Before, it is as the seed made it.
        state["judge"] = run.judge.state_dict()
        state["judge_optimizers"] = [one.state_dict() for one in run.judge_optimizers]
    folder = run.folder / f"step_{run.step:06d}"
    with written_aside(folder) as aside:
        raw = {name: value.cpu().contiguous() for name, value in run.network.state_dict().items()}
        guarded(lambda path: save_file(raw, path), aside / RAW_FILE)
        guarded(lambda path: torch.save(state, path), aside / STATE_FILE)
        text = json.dumps(to_json(progress), indent=2)
        (aside / "progress.json").write_text(text + "\n", encoding="utf-8")
        with run.averaged(), torch.no_grad():
            mean, std = measure_statistics(_raw_latents(run))
            power = sum(m**2 + s**2 for m, s in zip(mean, std, strict=True)) / len(mean)
            # What diffusers alone would scale by: one number for all channels.
            run.network.register_to_config(scaling_factor=float(f"{power**-0.5:.4g}"))
            guarded(lambda path: save_network(run.network, path.parent, (mean, std)), aside / "_")
    write_file(run.folder / LAST_FILE, folder.name)
    keep_newest(run.folder, run.config.keep_checkpoints)
    run.log.event("checkpoint", {"step": run.step, "folder": str(folder)})
    return folder


def _raw_latents(run: AutoencoderRun) -> Iterator[Tensor]:
    per_batch = run.config.batch_size * run.config.num_frames
    for index in range(-(-MEASURED_FRAMES // per_batch)):
        frames = run.loader.batch(index).frames.flatten(0, 1)
        for part in frames.split(64):
            yield raw_latents("AutoencoderDC", run.network, part.to(run.device))
