"""What is saved of a world model and of a run, written so that a kill leaves the last one whole.

A world folder holds `config.json` (format, model, autoencoder, data card, sampling) and
`model.safetensors`: all that a rollout needs. One that is passed on also holds `clips.safetensors`,
clips to begin from, and `README.md`, its card. A run folder holds

    config.json        the TrainConfig of the run
    log.jsonl          what happened
    step_000100/       a world folder of the averaged weights (EMA), or what else is trained; and
        raw.safetensors    the weights themselves
        optimizer.pt       state of the optimisers
        auxiliary.pt       networks trained beside the model, with their optimisers, if any
        progress.json      step, number of EMA updates, processes
    last               a text file that names the newest step folder
    lock               locked by the process that trains here
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scd.autoencoders.build import Autoencoder, build_autoencoder
from scd.autoencoders.config import AutoencoderConfig
from scd.common.config import from_json, to_json
from scd.common.files import write_file, written_aside
from scd.common.hub import upload
from scd.common.names import did_you_mean, refuse_unknown
from scd.common.places import named_by
from scd.common.runtime import choose_device, without_weights
from scd.common.weights import (
    SHARD_BYTES,
    guarded,
    is_file_of,
    is_stored,
    read_torch,
    save_tensors,
    write_shards,
)
from scd.data.source import DataCard
from scd.models.about import read_about
from scd.models.build import Diffuser, build, num_parameters
from scd.models.clips import CLIPS_FILE, Clips, clips_in
from scd.models.config import SamplingConfig
from scd.models.kinds import ModelConfig
from scd.models.names import CARD_FILE, PICTURE_FILE, WORLDS, find_world, shipped_names
from scd.models.progress import PROGRESS_FILE, Progress
from scd.models.weights import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    choose_dtype,
    load_weights,
    read_settings,
)
from scd.models.world_card import WorldFacts, card_text

PACKAGE = Path(__file__).resolve().parent.parent
"""Folder of this package."""

STATE = "a state of training"
"""What a file of optimisers or of auxiliary networks holds."""

NUM_READS = 20
"""Times that a world is read whose folder another process replaces meanwhile."""

RAW_FILE = "raw.safetensors"
"""Weights that the optimiser moves, in a checkpoint of a run."""

FROM_NOTHING = "begins_from_nothing"
"""Field of a world's config.json; where it lacks, the world was not taught to."""


@dataclass
class World:
    """A world model with everything that a rollout of it needs."""

    model: Diffuser
    """The network."""
    autoencoder: Autoencoder
    """Between pixels and the network's latents."""
    card: DataCard
    """What the frames and actions mean."""
    sampling: SamplingConfig
    """How frames are denoised unless the caller says otherwise."""
    begins_from_nothing: bool = False
    """Whether it was taught to make a first frame without any before it, so that streams begin so
    unless they are given frames. False: they begin from its clips, if it carries any."""
    folder: Path | None = field(default=None, repr=False)
    """Where it was read from; None: it was made here."""
    own_clips: Clips | None = field(default=None, repr=False)
    """Of `clips`, where they are not, or not yet, those of the folder."""

    @property
    def clips(self) -> Clips:
        """Clips to begin streams from; read when first asked for.

        Raises:
            ValueError: their file is damaged, or holds something else.
        """
        if self.own_clips is None:
            found = None if self.folder is None else clips_in(self.folder, self.card)
            self.own_clips = found or Clips.none(self.card.height, self.card.width)
        return self.own_clips

    @clips.setter
    def clips(self, clips: Clips) -> None:
        self.own_clips = clips

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: torch.device | str = "cpu",
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **unknown: Any,
    ) -> World:
        """Load a world by name: the same as `scd.load`."""
        refuse_unknown(unknown, cls.from_pretrained)
        return load(
            name,
            weights=weights,
            device=device,
            revision=revision,
            dtype=dtype,
            torch_dtype=torch_dtype,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], name: str = "") -> Path:
        """Write a folder to pass on: settings, weights, clips and a model card.

        A card (README.md) that is there already stays as it is. An autoencoder of pictures goes
        along, in `vae/`.

        Args:
            folder: a new one, or one that holds a world and nothing else, which is replaced.
            name: by which others will load it, for the card; empty: the folder's.

        Raises:
            FileExistsError: something else than a world is there.
            OSError: it could not be written; what was there is still there.
        """
        folder = Path(folder)
        _refuse_others(folder, {CONFIG_FILE, CLIPS_FILE, CARD_FILE, PICTURE_FILE, "vae"})
        clips, card = self.clips, folder / CARD_FILE
        text = card.read_text("utf-8") if card.is_file() else self.model_card(name or folder.name)
        with written_aside(folder) as aside:
            whole = replace(self, autoencoder=self.autoencoder.carried(aside))
            write_world(whole, self.model.state_dict(), aside)
            if len(clips):
                _write_tensors(clips.stored(), aside / CLIPS_FILE)
            (aside / CARD_FILE).write_text(text, encoding="utf-8")
        return folder

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "A world of scd",
    ) -> str:
        """Put what `save_pretrained` writes into a repository on the hub; return its address.

        Args:
            name: owner/name, or a name under the owner of the token.
            private: whether a new repository is hidden from others.
            token: of an account that may write; None: the one of `hf auth login`.
            commit_message: of the commit.

        Raises:
            ValueError: no name that the hub could have.
            OSError: the hub cannot be reached or refused.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "world", name)
            return upload(folder, name, private, token, commit_message)

    def model_card(self, name: str) -> str:
        """Return the text of a card, README.md, by which others know what this is.

        Args:
            name: by which they load it.
        """
        clips = self.clips
        facts = WorldFacts(
            model=self.model.config,
            autoencoder=type(self.autoencoder.config).__name__,
            card=self.card,
            sampling=self.sampling,
            num_parameters=num_parameters(self.model),
            num_clips=len(clips),
            num_clip_frames=clips.frames.shape[1],
            begins_from_nothing=self.begins_from_nothing,
            trained="" if self.folder is None else read_about(self.folder).trained,
        )
        return card_text(name, facts)


def save_world(world: World, folder: str | os.PathLike[str]) -> Path:
    """Write a world folder, replacing the one that may be there.

    Raises:
        FileExistsError: something else than a world folder is there.
        OSError: it could not be written; what was there is still there.
    """
    folder = Path(folder)
    _refuse_others(folder, {CONFIG_FILE})
    with written_aside(folder) as aside:
        write_world(world, world.model.state_dict(), aside)
    return folder


def _refuse_others(folder: Path, ours: set[str]) -> None:
    """Refuse a place where something else is than weights and files of these names."""
    if folder.exists():
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
        others = {name for name in names - ours if not is_file_of(name, WEIGHTS_FILE)}
        if others:
            raise FileExistsError(f"{folder} holds other things than a world: {sorted(names)}")


def load(
    name: str | os.PathLike[str],
    *,
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **unknown: Any,
) -> World:
    """Load a world by name.

    Args:
        name: a world that comes with the package, such as "doom"; a world folder, run or step of a
            run; or `owner/name` on the hub.
        weights: the averaged weights, or those the optimiser moved (only in a run).
        device: where the model goes.
        revision: branch, tag or commit on the hub; None: the newest.
        dtype: type of the model's weights: torch.float32, torch.bfloat16, torch.float16 or one of
            their names. None: float32, of one of Wan's as they are stored; "auto": as stored.
        torch_dtype: the same, by its older name.
        unknown: refused.

    Raises:
        FileNotFoundError: no such world, or the hub cannot be reached; says which there are.
        ValueError: the files are damaged, of another format, or do not fit together; or an argument
            or a device that there is not.
    """
    refuse_unknown(unknown, load)
    wanted = choose_dtype(dtype, torch_dtype)
    where = device if isinstance(device, torch.device) else choose_device(device)
    world = load_world(find_world(name, revision), weights, where, "auto" in (dtype, torch_dtype))
    if wanted is not None:
        world.model.to(dtype=wanted)
    return world


def as_world(world: World | str | os.PathLike[str]) -> World:
    """Return a world, loaded if it is given by name."""
    return world if isinstance(world, World) else load(world)


def load_world(
    path: str | os.PathLike[str],
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | str = "cpu",
    as_stored: bool = False,
) -> World:
    """Load a world from a world folder, a run folder (its newest step) or one step of a run.

    Args:
        path: the folder.
        weights: the averaged weights, or those the optimiser moved (only in a run).
        device: where the model goes.
        as_stored: leave weights in the type in which they are stored.

    Returns:
        The world; its model is in eval mode and, unless `as_stored`, in float32, one of Wan's in
        the type in which its weights are stored.

    Raises:
        FileNotFoundError: no world is there.
        ValueError: the files are damaged, of another format, or do not fit together.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw', got {weights!r}")
    for _ in range(NUM_READS):
        folder = resolve(path)
        before = _which(folder)
        try:
            world = _read_world(folder, weights, device, as_stored)
        except (OSError, ValueError):
            if _which(folder) == before:
                raise
            continue
        # Another process may have put another world into its place: then this is half of each.
        if _which(folder) == before:
            return world
    raise OSError(f"{path} was replaced {NUM_READS} times while it was read: wait, and try again")


def _which(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from another one at the same place."""
    found = folder.stat()
    return found.st_ino, found.st_mtime_ns


def _read_world(
    folder: Path, weights: Literal["ema", "raw"], device: torch.device | str, as_stored: bool
) -> World:
    parts = read_world_parts(folder)
    with without_weights():
        # No weights are drawn, only to be replaced.
        model = build(parts["model"])
    name = WEIGHTS_FILE if weights == "ema" else RAW_FILE
    if weights == "raw" and not is_stored(folder / name):
        raise FileNotFoundError(f"{folder} has no raw weights ({name}): only runs keep them")
    load_weights(model, folder / name, str(device))
    if not (as_stored or parts["model"].keeps_stored_type):
        # Small worlds are passed on in fewer bits than they compute with; Wan's stay as stored,
        # since twice their size may not fit.
        model.float()
    return World(
        model=model.to(device).eval(),
        autoencoder=build_autoencoder(parts["autoencoder"].beside(folder), device),
        card=parts["card"],
        sampling=parts["sampling"],
        begins_from_nothing=parts[FROM_NOTHING],
        folder=folder,
    )


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the world folder that a path means: itself, the newest step of a run, or, of a name
    under which nothing lies, the world of that name which comes with the package.

    Raises:
        FileNotFoundError: the path does not lead to a world folder.
    """
    folder = Path(path)
    if not folder.exists() and os.fspath(path) in shipped_names():
        folder = WORLDS / folder
    if (folder / "last").is_file():
        folder = named_by(folder / "last")
    if not folder.is_dir():
        beside = folder.parent.glob("*/") if folder.parent.is_dir() else ()
        near = did_you_mean(
            folder.name, [entry.name for entry in beside if entry.is_dir()] + shipped_names()
        )
        listed = ", ".join(shipped_names()) or "no worlds"
        raise FileNotFoundError(
            f"needed a world or run folder, there is none at {folder}{near}. "
            f"The package has {listed}"
        )
    if not is_stored(folder / WEIGHTS_FILE):
        raise FileNotFoundError(
            f"{folder} is neither a world (model.safetensors) nor a run with a checkpoint (last)"
        )
    return folder


def results_folder(run: str | os.PathLike[str]) -> Path:
    """Return where results about a world go unless somebody says otherwise.

    That is the run's folder, whose steps come and go, or the world's own; the current one where it
    is not ours to write: a world that comes with the package, or from the hub.
    """
    folder = resolve(run)
    if (folder.parent / "last").is_file():
        folder = folder.parent
    is_ours = Path(run).is_dir() and PACKAGE not in folder.resolve().parents
    return folder if is_ours and os.access(folder, os.W_OK) else Path()


def last_step(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, or None if it has none.

    Raises:
        FileNotFoundError: `last` names a folder that is gone.
    """
    if not (run / "last").is_file():
        return None
    return resolve(run)


def save_step(
    run: Path,
    write: Callable[[Path], object],
    raw: Mapping[str, Tensor],
    optimizers: list[dict[str, Any]],
    progress: Progress,
    keep: int,
    auxiliary: Mapping[str, Any] | None = None,
) -> Path:
    """Write `step_<n>` of a run, point `last` at it and remove older ones.

    Args:
        run: the run folder; it exists.
        write: writes what the run makes into a folder, of the averaged weights.
        raw: the weights that the optimiser moves.
        optimizers: state dict of each optimiser.
        progress: where the run stands.
        keep: how many of the newest steps stay, 1 or more.
        auxiliary: state of each network trained beside the model, by name.

    Raises:
        OSError: it could not be written, e.g. the disk is full; the earlier steps are untouched.
    """
    assert keep >= 1
    folder = run / f"step_{progress.step:06d}"
    with written_aside(folder) as aside:
        write(aside)
        _write_tensors(raw, aside / RAW_FILE)
        guarded(lambda path: torch.save(optimizers, path), aside / "optimizer.pt")
        if auxiliary:
            guarded(lambda path: torch.save(auxiliary, path), aside / "auxiliary.pt")
        (aside / PROGRESS_FILE).write_text(
            json.dumps(to_json(progress), indent=2) + "\n", encoding="utf-8"
        )
    write_file(run / "last", folder.name)
    keep_newest(run, keep)
    return folder


def keep_newest(run: Path, number: int) -> None:
    """Remove the oldest step folders of a run; `number` of the newest stay, and what `last` names.

    Later ones than that are of a course that was given up for an older checkpoint: they do not
    count, and are replaced as the run comes to their steps.

    Raises:
        OSError: they could not be removed.
    """
    named = named_by(run / "last").name
    steps = sorted(run.glob("step_*"), key=lambda old: int(old.name.removeprefix("step_")))
    if named in (names := [step.name for step in steps]):
        steps = steps[: names.index(named) + 1]
    for old in steps[:-number]:
        if old.name != named:
            shutil.rmtree(old)


def load_optimizers(step_folder: Path) -> list[dict[str, Any]]:
    """Read the optimisers' state of a checkpoint; nothing but tensors and numbers is accepted.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    return read_torch(step_folder / "optimizer.pt", STATE)


def load_auxiliary(step_folder: Path) -> dict[str, Any]:
    """Read the state of the networks trained beside the model; none where there is no such file.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    path = step_folder / "auxiliary.pt"
    return read_torch(path, STATE) if path.exists() else {}


def write_world_settings(
    folder: Path,
    model: ModelConfig,
    autoencoder: AutoencoderConfig,
    card: DataCard,
    sampling: SamplingConfig,
    begins_from_nothing: bool = False,
) -> dict[str, Any]:
    """Write the config.json of a world folder and return what it holds."""
    config: dict[str, Any] = {
        "format": FORMAT,
        "model": to_json(model),
        "autoencoder": to_json(autoencoder),
        "card": to_json(card),
        "sampling": to_json(sampling),
    }
    if begins_from_nothing:
        config[FROM_NOTHING] = True
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def write_world(world: World, state: Mapping[str, Tensor], folder: Path) -> None:
    config = write_world_settings(
        folder,
        world.model.config,
        world.autoencoder.config,
        world.card,
        world.sampling,
        world.begins_from_nothing,
    )
    _write_tensors(state, folder / WEIGHTS_FILE, {"config": json.dumps(config)})


def read_world_parts(folder: Path) -> dict[str, Any]:
    """Read the settings of a world folder: "model", "autoencoder", "card" and "sampling".

    And whether it "begins_from_nothing".

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, of another format, or not complete.
    """
    path = folder / CONFIG_FILE
    values = read_settings(path)
    kinds = {
        "model": ModelConfig,
        "autoencoder": AutoencoderConfig,
        "card": DataCard,
        "sampling": SamplingConfig,
    }
    unknown = sorted(set(values) - set(kinds) - {"format", FROM_NOTHING})
    missing = sorted(set(kinds) - set(values))
    if unknown or missing:
        raise ValueError(f"{path}: unknown fields {unknown}, missing fields {missing}")
    begins = values.get(FROM_NOTHING, False)
    if not isinstance(begins, bool):
        raise ValueError(f"{path}: {FROM_NOTHING} must be true or false, got {begins!r}")
    parts = {name: from_json(kind, values[name], f"{path}: {name}") for name, kind in kinds.items()}
    _check_parts(parts["model"], parts["autoencoder"], parts["card"], str(path))
    return {FROM_NOTHING: begins} | parts


def _check_parts(
    model: ModelConfig, autoencoder: AutoencoderConfig, card: DataCard, where: str
) -> None:
    """Refuse parts of a world that do not fit each other (ValueError), before any is built."""
    try:
        latents = build_autoencoder(autoencoder).latent_shape(card.height, card.width)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if latents != model.shape.shape:
        raise ValueError(
            f"{where}: frames of {card.height}x{card.width} have latents {list(latents)}, the "
            f"model works on {list(model.shape.shape)}"
        )
    if card.conditions != model.conditions:
        raise ValueError(
            f"{where}: the card says {card.conditions}, the model is steered by {model.conditions}"
        )


def _write_tensors(
    state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > SHARD_BYTES:
        # In several files, one tensor after another: no second copy of a large model.
        parts = ((name, tensor.detach().to("cpu")) for name, tensor in state.items())
        stem = path.name.removesuffix(".safetensors")
        write_shards(parts, path.parent, stem, SHARD_BYTES)
        return
    # Tied weights share memory, which the format refuses: the file gets a copy of each.
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu").contiguous()
        tied = tensor.data_ptr() in seen and tensor.numel() > 0
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.clone() if tied else tensor
    save_tensors(tensors, path, metadata)
