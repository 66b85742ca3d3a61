"""Training of an autoencoder of pictures: `scd train-autoencoder`.

First the distances alone; then, from the averaged weights on and with the encoder frozen, also a
judge of patches. So the latents no longer move in the second part, and the decoder learns on
exactly those that the finished encoder makes. The loop is not the trainer's, which knows worlds:
here is nothing that looks at time, at actions or at noise. One process; a step draws nothing, and
its batch follows from its number, so a continued training repeats the uninterrupted one, on a CPU
bit for bit. Source: paper, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import peak_memory_gib
from scd.common.signals import StopRequest
from scd.data.clip import Batch
from scd.evaluation.image import Estimate, estimates, frame_values
from scd.evaluation.media import PictureRow, write_grid
from scd.evaluation.predict import choose_windows, count_windows, read_windows
from scd.objectives.reconstruct import (
    deception_loss,
    judgement_loss,
    last_layer_of,
    reconstruction_loss,
)
from scd.optim.optim import lr_multiplier, refuse_non_finite, set_lr
from scd.training.autoencoder_run import AutoencoderRun, save, start
from scd.training.autoencoder_settings import TrainAutoencoderConfig

RESULT_FILE = "held_out.json"
"""How well the finished autoencoder reconstructs clips that it has not seen."""

NUM_SHOWN = 8
"""Held-out clips whose first frame is shown."""


def train_autoencoder(config: TrainAutoencoderConfig) -> dict[str, Estimate]:
    """Train until the steps are done or the time is over, save, and measure on held-out clips.

    SIGINT and SIGTERM save and interrupt; the same command goes on.

    Returns:
        PSNR, SSIM and the mean squared error of reconstructions, with intervals over clips.

    Raises:
        ValueError: frames that the network cannot cut into cells, data smaller than a step, weights
            of LPIPS that are not those wanted, a damaged checkpoint, or a loss that is not finite:
            then the step's number is named and the weights have not moved.
        FileExistsError: the folder holds another training, or something else.
        OSError: the data cannot be read, a checkpoint not be written, or another process trains
            there.
        Interrupted: a signal came; what was trained is saved.
    """
    with StopRequest(config.time_limit_s) as stop:
        run = start(config)
        stream, reason = run.loader.stream(run.step), ""
        try:
            while run.step < config.max_steps and not reason:
                with run.clock.waiting():
                    batch = next(stream)
                logs = train_step(run, batch)
                # Once per step: a signal in between would end the loop without a checkpoint.
                reason = stop.reason
                _after_step(run, logs, last=run.step == config.max_steps or bool(reason))
            run.log.event("end", {"step": run.step, "reason": reason or "all steps are done"})
            # A second look: the signal may have come while the last step was saved.
            if stop.signal_name:
                raise stop.interrupted(run.step, config.max_steps, run.folder)
            return _finish(run)
        finally:
            stream.close()
            run.log.close()
            run.lock.close()


def train_step(run: AutoencoderRun, batch: Batch) -> dict[str, float]:
    """Move the weights once.

    Raises:
        ValueError: a loss or gradient that is not finite.
    """
    config = run.config
    if run.adversarial:
        freeze_encoder(run)
    frames = batch.frames.flatten(0, 1).to(run.device)
    set_lr(
        [*run.optimizers, *run.judge_optimizers],
        lr_multiplier(config.optim, run.step, config.max_steps),
    )
    half = config.precision == "bf16"
    with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
        made = run.network(frames).sample
    made = made.float()
    loss, logs = reconstruction_loss(made, frames, run.distance, config.perceptual_weight)
    if run.adversarial:
        run.judge.requires_grad_(False)
        last_layer = last_layer_of(run.network)
        deception, found = deception_loss(
            run.judge, made, loss, last_layer, config.adversarial_weight
        )
        loss, logs = loss + deception, logs | found
    norms = {"grad_norm": _update(run, run.network, run.optimizers, loss)}
    if run.adversarial:
        run.judge.requires_grad_(True)
        judgement, found = judgement_loss(run.judge, made, frames)
        norms["judge_grad_norm"] = _update(run, run.judge, run.judge_optimizers, judgement)
        logs = logs | found
    run.ema.update()
    run.step += 1
    run.clock.count_step()
    found = {"loss": loss} | logs | norms
    # All in one wait for the device, beside that of each network's update.
    return dict(
        zip(found, torch.stack([one.detach() for one in found.values()]).tolist(), strict=True)
    )


def freeze_encoder(run: AutoencoderRun) -> None:
    """Freeze the encoder; at the first step of the second part, at the averaged weights.

    They are what is saved: the decoder then learns on the latents that the saved encoder makes.
    """
    if run.step == run.config.reconstruction_steps:
        run.network.load_state_dict(run.ema.state_dict(), strict=False)
    run.network.encoder.requires_grad_(False)


def _update(run: AutoencoderRun, module: nn.Module, optimizers: list[Any], loss: Tensor) -> Tensor:
    """Move the weights of a network along its gradient; return the gradient's norm."""
    loss.backward()
    limit = run.config.optim.clip_norm or math.inf
    norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
    refuse_non_finite(run.step, *torch.stack([loss.detach(), norm]).tolist())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def _after_step(run: AutoencoderRun, logs: dict[str, float], last: bool) -> None:
    """Log, save and look at held-out clips, as it falls due."""
    config = run.config
    run.log.advance(run.step, f"loss {logs['loss']:.4f}  {run.clock.steps_per_s:.2f} steps/s")
    if last or run.step % config.log_every == 0:
        lr = config.optim.lr * lr_multiplier(config.optim, run.step - 1, config.max_steps)
        memory = {"memory_gib": peak_memory_gib(run.device)}
        run.log.event("step", {"step": run.step} | logs | {"lr": lr} | run.clock.read() | memory)
    with run.clock.away():
        if last or (config.save_every and run.step % config.save_every == 0):
            save(run)
        if not last and config.validate_every and run.step % config.validate_every == 0:
            _validate(run)


def _validate(run: AutoencoderRun) -> dict[str, Estimate]:
    """Measure the averaged weights on held-out clips, log it, and write a picture."""
    with run.averaged():
        found, shown = measure_reconstruction(run)
    run.log.event(
        "validation", {"step": run.step} | {name: one.mean for name, one in found.items()}
    )
    true, made = shown
    rows = [PictureRow(name="truth", frames=true), PictureRow(name="autoencoder", frames=made)]
    labels = [str(number) for number in range(len(true))]
    write_grid(rows, labels, run.folder / "samples" / f"step_{run.step:06d}.png")
    return found


@torch.no_grad()
def measure_reconstruction(
    run: AutoencoderRun,
) -> tuple[dict[str, Estimate], tuple[Tensor, Tensor]]:
    """Measure what the network makes of held-out clips, as it is.

    Returns:
        Metrics, frame by frame and averaged over clips; and some frames [f 3 h w], true and made.
    """
    num_frames, source = run.config.num_frames, run.held_out
    num_clips = _num_held_out(run)
    windows = choose_windows(source, num_clips, num_frames, seed=0)
    values: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, Tensor]] = []
    for first in range(0, num_clips, 8):
        true = read_windows(source, windows[first : first + 8], num_frames).frames
        flat = run.network(true.flatten(0, 1).to(run.device)).sample
        made = flat.float().clamp(-1, 1).cpu().unflatten(0, true.shape[:2])
        shown += [(true[:, 0], made[:, 0])]
        for name, of_frames in frame_values(made, true).items():
            values.setdefault(name, []).append(of_frames.mean(1))
    found = estimates({name: torch.cat(parts) for name, parts in values.items()})
    true, made = (torch.cat(side)[:NUM_SHOWN] for side in zip(*shown, strict=True))
    return found, (true, made)


def _num_held_out(run: AutoencoderRun) -> int:
    """Return how many held-out clips are measured, 1 or more: `choose_windows` refuses none."""
    there = count_windows(run.held_out, run.config.num_frames)
    return min(run.config.num_validation_clips, max(1, there))


def _finish(run: AutoencoderRun) -> dict[str, Estimate]:
    """Measure, and write the result beside the checkpoints."""
    found = _validate(run)
    result = {
        "step": run.step,
        "elapsed_s": run.clock.total_s,
        "num_clips": _num_held_out(run),
        "num_frames": run.config.num_frames,
        "held_out": {name: to_json(estimate) for name, estimate in found.items()},
        "settings": to_json(run.config),
    }
    write_json(result | provenance(run.device), run.folder / RESULT_FILE)
    return found


def readable(found: Mapping[str, Estimate]) -> str:
    """Say in one line for people how well an autoencoder reconstructs."""
    parts = [
        f"{label} {found[name].mean:.{digits}f} [{found[name].ci_low:.{digits}f}, "
        f"{found[name].ci_high:.{digits}f}]"
        for name, label, digits in (
            ("psnr", "PSNR", 2),
            ("psnr_per_frame", "PSNR per frame", 2),
            ("ssim", "SSIM", 4),
        )
        if name in found
    ]
    return f"held-out reconstruction: {', '.join(parts)}"
