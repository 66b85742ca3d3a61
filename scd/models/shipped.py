"""The world that comes with the package, and worlds that carry clips to start from.

A shipped folder holds, besides `config.json` and `model.safetensors` in bfloat16,
`clips.safetensors`: held-out clips to begin a stream from, since a world alone has no data. Where
latents are not pixels, their autoencoder is in `vae/`, in bfloat16 too.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scd.common.files import written_aside
from scd.common.weights import save_tensors
from scd.data.clip import Batch, frames_to_pixels
from scd.models.checkpoint import load_world, read_world_parts, resolve, write_world
from scd.models.clips import CLIPS_FILE, Clips, clips_in
from scd.models.config import SamplingConfig
from scd.models.names import WORLDS, shipped_names


def shipped_world() -> Path:
    """Return the folder of the best world that comes with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    if not (names := shipped_names()):
        raise FileNotFoundError(f"this installation has no shipped world in {WORLDS}: name a RUN")
    return WORLDS / names[0]


def parts_beside(run: str) -> str:
    """Return the world's own folder if it holds the parts, wherever it was moved; else nothing."""
    folder = resolve(run)
    return str(folder) if (folder / "vae").is_dir() else ""


def find_world_parts(source: str) -> dict[str, Any] | None:
    """Return the settings of a world or run as `read_world_parts` does, its autoencoder where it
    lies beside the world if it does; None: there is none of that name."""
    with suppress(FileNotFoundError):
        parts = read_world_parts(resolve(source))
        if beside := parts_beside(source):
            parts["autoencoder"] = replace(parts["autoencoder"], source=beside)
        return parts
    return None


def read_clips(folder: str | os.PathLike[str]) -> Clips | None:
    """Read the clips of a world or run folder; None: it carries none.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    place = resolve(folder)
    if not (place / CLIPS_FILE).is_file():
        return None
    return clips_in(place, read_world_parts(place)["card"])


def ship(
    run: str | os.PathLike[str],
    clips: Batch,
    folder: str | os.PathLike[str],
    sampling: SamplingConfig | None = None,
) -> Path:
    """Write the averaged weights of a run in bfloat16, and clips, as a folder to pass on.

    Args:
        run: world, run or step folder.
        clips: frames [b t 3 h w] in [-1, 1] with the id of the action of each.
        folder: where to; a new one.
        sampling: how its frames are denoised from now on; None: as the run says.

    Raises:
        FileExistsError: the folder is there.
        FileNotFoundError: there is no run.
        ValueError: the clips have no actions by id, or another size than the world.
    """
    if Path(folder).exists():
        raise FileExistsError(f"{folder} is there already")
    world = load_world(run)
    actions = clips.conditions.actions
    if actions is None or actions.is_floating_point():
        raise ValueError("clips to ship need an action id for each frame")
    if clips.frames.shape[-2:] != (world.card.height, world.card.width):
        raise ValueError(
            f"clips must be {world.card.height}x{world.card.width}, got "
            f"{clips.frames.shape[-2]}x{clips.frames.shape[-1]}"
        )
    pixels = frames_to_pixels(clips.frames).movedim(-1, -3)
    with written_aside(Path(folder)) as aside:
        light = replace(
            world,
            model=world.model.bfloat16(),
            sampling=sampling or world.sampling,
            autoencoder=world.autoencoder.carried(aside, torch.bfloat16),
        )
        write_world(light, light.model.state_dict(), aside)
        save_tensors(Clips(frames=pixels, actions=actions.long()).stored(), aside / CLIPS_FILE)
    return Path(folder)
