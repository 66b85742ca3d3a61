"""Data and settings of a run brought together: what the data decides, what does not fit it."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.build import (
    Autoencoder,
    build_autoencoder,
    fingerprint,
    refuse_other,
)
from scd.autoencoders.config import AutoencoderConfig, PixelConfig
from scd.autoencoders.text_encoder import text_fingerprint
from scd.common.config import differences, from_json, to_json
from scd.common.files import read_json
from scd.data.frame_rate import check_rate
from scd.data.latents import INFO_FILE, PLACE, LatentSource, is_latents
from scd.data.loader import Loader
from scd.data.prompts import PromptSource, is_prompts
from scd.data.source import DataCard, Source, open_source
from scd.data.spaces import Split
from scd.models.build import Diffuser
from scd.models.checkpoint import read_world_parts, resolve
from scd.models.shipped import parts_beside
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights
from scd.objectives.config import DenoiseConfig, MatchConfig, TeacherForcingConfig
from scd.training.config import TrainConfig
from scd.training.folder import LAST_FILE

NUM_MEASURED_BATCHES = 16
"""Batches whose pixels are measured; with 2 clips of 16 frames that is 512 frames, where the mean
and deviation no longer move by a hundredth."""

FREE_SETTINGS = (
    "model.cache",
    "model.skip",
    "model.num_diagonal",
    "model.block.initial_gate",
    "model.block.initial_condition_std",
    "autoencoder.source",
)
"""Settings in which a run may differ from the world it starts from: none has to do with what a
weight is for."""

FREE_WAN_SETTINGS = (
    *FREE_SETTINGS,
    "model.encoder.noise",
    "model.encoder.lowest_time",
    "model.encoder.shift",
    "model.decoder.join",
    "model.decoder.context_time",
    "model.frames_per_block",
    "model.num_local_frames",
)
"""Likewise of a Wan model: what the paper leaves open is decided by the training, not by the
conversion."""


logger = logging.getLogger(__name__)


def check_window(config: TrainConfig) -> None:
    """Refuse a memory that is longer than the clips of the training (ValueError).

    A model that was trained before, and is only distilled, keeps the memory that it has.
    """
    window = config.model.cache.window
    from_data = isinstance(config.objective, DenoiseConfig | TeacherForcingConfig)
    if window > config.num_frames and from_data:
        raise ValueError(
            f"model.cache.window is {window}, but num_frames is {config.num_frames}: "
            "attention beyond num_frames is untrained"
        )


def check_rollout(config: TrainConfig) -> None:
    """Refuse rollouts that a Wan student cannot do (ValueError); its settings tell."""
    model = config.model
    size = model.frames_per_block
    if config.num_frames % size:
        raise ValueError(
            f"num_frames must be whole blocks of the student's {size} frames, got "
            f"{config.num_frames}"
        )
    window = model.cache.window
    recomputes = model.recomputes_streams and config.gradient_checkpointing
    if recomputes and config.num_frames > window:
        raise ValueError(
            f"a rollout of {config.num_frames} frames leaves the student's window of {window}, and "
            "what has left it cannot be recomputed: lengthen model.cache.window, or set "
            "gradient_checkpointing off"
        )


def check_fit(config: TrainConfig, card: DataCard, autoencoder: Autoencoder | None = None) -> None:
    """Refuse a model for other frames, conditions or lengths than the data's, or one that starts
    from a world of another rate (ValueError)."""
    check_window(config)
    autoencoder = autoencoder or build_autoencoder(config.autoencoder)
    shape = autoencoder.latent_shape(card.height, card.width)
    if config.model.shape.shape != shape:
        raise ValueError(
            f"{config.data} gives latent frames of {shape} (channels, rows, columns), "
            f"but model.shape is {config.model.shape.shape}"
        )
    if config.model.conditions != card.conditions:
        raise ValueError(
            f"{config.data} is steered by {card.conditions}, "
            f"but model.conditions is {config.model.conditions}"
        )
    if config.initial:
        # A run that is continued needs it no more.
        with suppress(FileNotFoundError):
            fps = read_world_parts(resolve(config.initial))["card"].fps
            check_rate(config.initial, fps, config.data, card.fps)


def open_split(config: TrainConfig, split: Split) -> Source:
    """Open a split as training sees it: stored latents where the data holds such."""
    return open_source(config.data, split, config.strict, latents=True)


def open_training(
    config: TrainConfig, autoencoder: Autoencoder | None = None, source: Source | None = None
) -> Source:
    """Open the training split, or embedded prompts, and see that a run can learn from them.

    Autoencoder and source may be open already: then they are only checked.
    """
    if is_prompts(config.data):
        return _open_prompts(config)
    source = source or open_split(config, "train")
    if isinstance(source, LatentSource):
        _check_autoencoder(config, source, autoencoder or build_autoencoder(config.autoencoder))
        _check_text_encoder(config, source)
    elif config.model.takes_text:
        raise ValueError(
            f"{config.data} holds no latents: write them first (scd encode {config.data} "
            "--autoencoder RUN --text-encoder RUN --out LATENTS), and name those"
        )
    return source


def _open_prompts(config: TrainConfig) -> PromptSource:
    """Open a folder of embedded prompts, which train and hold out the same ones."""
    objective = config.objective
    if not isinstance(objective, MatchConfig) or objective.needs_clips or config.validate_every:
        raise ValueError(
            f"{config.data} holds prompts without frames: only rollouts from nothing learn from "
            "them (num_given_frames=0, method 'dmd' or 'sid'), and validate_every must be 0"
        )
    if not config.initial:
        raise ValueError("a run on prompts starts from a world: initial must name it")
    card = read_world_parts(resolve(config.initial))["card"]
    source = PromptSource(config.data, card, config.model.shape.shape, config.num_frames)
    _check_text_encoder(config, source)
    return source


def _check_autoencoder(config: TrainConfig, source: LatentSource, autoencoder: Autoencoder) -> None:
    """Refuse latents of another autoencoder than the run's (ValueError)."""
    theirs, ours = (
        {name: value for name, value in settings.items() if name != PLACE}
        for settings in (source.info.autoencoder, to_json(config.autoencoder))
    )
    different = differences(theirs, ours)
    if different:
        raise ValueError(
            f"{config.data} holds latents of another autoencoder than the run's (its setting, then "
            f"the run's): {'; '.join(different)}"
        )
    try:
        found = fingerprint(autoencoder)
    except FileNotFoundError as error:
        # Latents need no autoencoder to be trained on: only the comparison does.
        logger.warning("whether the run's autoencoder made %s was not seen: %s", source.path, error)
        return
    refuse_other(source.info.fingerprint, found, config.data)


def _check_text_encoder(config: TrainConfig, source: LatentSource | PromptSource) -> None:
    """Refuse prompts that another text encoder embedded than the one beside the run's autoencoder
    (ValueError), which is what the result will be steered by."""
    autoencoder: Any = config.autoencoder
    if not source.info.text or not autoencoder.has_text_encoder:
        return
    try:
        found = text_fingerprint(autoencoder.source)
    except FileNotFoundError as error:
        logger.warning("whether its text encoder made %s was not seen: %s", source.path, error)
        return
    # The arithmetic of the text encoder stands behind its name, and may be another.
    if found != source.info.text.rpartition("-")[0]:
        raise ValueError(
            f"{config.data} holds prompts that another text encoder embedded: {source.info.text}, "
            f"the one at {autoencoder.source} is {found}"
        )


def open_loader(
    config: TrainConfig, rank: int, num_processes: int, source: Source | None = None
) -> Loader:
    """Open the training split (`source`, where it is open already) as a stream of the batches of
    one process."""
    return Loader(
        source or open_training(config),
        config.batch_size,
        config.num_frames,
        config.seed,
        rank=rank,
        num_ranks=num_processes,
        workers=config.num_loader_workers,
        on_error=config.data_on_error,
    )


def fit_window(config: TrainConfig, base: TrainConfig | None = None) -> TrainConfig:
    """Return the run with a memory as long as its clips, unless its window was changed from that of
    `base`, the run before anybody changed its fields (None: nobody did)."""
    cache = config.model.cache
    if base is not None and cache.window != base.model.cache.window:
        check_window(config)
        return config
    cache = replace(cache, window=config.num_frames)
    return replace(config, model=replace(config.model, cache=cache))


def fit_to_data(
    config: TrainConfig, base: TrainConfig | None = None, source: Source | None = None
) -> TrainConfig:
    """Return the run with frame size, conditions and pixel statistics of its data.

    Stored latents decide on the shape of the latents and on the autoencoder instead. The memory
    becomes as long as the clips: `fit_window`.

    Args:
        config: the run.
        base: the run before anybody changed its fields; None: nobody did.
        source: its training split, where it is open already.

    Raises:
        FileNotFoundError: no such data.
        ValueError: the frames cannot be cut into the model's patches, the model does not work on
            pixels, or a field was changed from `base` to another value than that of the data.
    """
    source = source or open_split(config, "train")
    if isinstance(source, LatentSource):
        fitted = _fit_to_latents(config, source)
    else:
        fitted = _fit_to_frames(config, source)
    fitted.model.shape.check_cut(config.data)
    given, found = _decided(config), _decided(fitted)
    before = given if base is None else _decided(base)
    for name, value in given.items():
        if value != before.get(name) and value != found.get(name):
            raise ValueError(
                f"{name} is {value}, but {config.data} says {found.get(name)}: leave it to the data"
            )
    return fit_window(fitted, base)


def decides(config: TrainConfig) -> bool:
    """Tell whether the run's data decides on its frames: pixels do, and stored latents."""
    return config.model.shape.channels == 3 or is_latents(config.data)


def fitted(config: TrainConfig, base: TrainConfig, needs_data: bool) -> TrainConfig:
    """Return a run as it is trained, with what its data decides.

    Args:
        config: the run, of which some fields were chosen.
        base: the run before.
        needs_data: whether data that is not there is an error.

    Raises:
        FileNotFoundError, ValueError: as `fit_to_data`.
    """
    if decides(fit_window(config, base)):
        try:
            return fit_to_data(config, base)
        except OSError:
            if needs_data:
                raise
    return fit_window(config, base)


def _fit_to_latents(config: TrainConfig, source: LatentSource) -> TrainConfig:
    info = source.info
    if config.model.takes_text and not info.card.conditions.has_text:
        raise ValueError(
            f"{config.data} holds latents without prompts, but a text steers a Wan model: "
            "write them with scd encode --text-encoder"
        )
    if config.initial and config.model.takes_text:
        _check_actions(config, info.card)
    channels, height, width = info.shape
    shape = replace(config.model.shape, channels=channels, height=height, width=width)
    model = replace(config.model, shape=shape, conditions=info.card.conditions)
    where = f"{source.path / INFO_FILE}: autoencoder"
    autoencoder = from_json(AutoencoderConfig, info.autoencoder, where)
    if autoencoder.placeless() == config.autoencoder.placeless():
        # The same settings elsewhere: weights are compared where they are opened.
        autoencoder = config.autoencoder
    return replace(config, model=model, autoencoder=autoencoder)


def _check_actions(config: TrainConfig, card: DataCard) -> None:
    """Refuse data of other actions than those of the Wan world that is trained (ValueError)."""
    ours, theirs = config.model.conditions, card.conditions
    if theirs.has_actions and not ours.has_actions:
        raise ValueError(
            f"{config.data} has actions, and {config.initial} is steered by a text alone: scd "
            f"convert wan --actions {config.data} writes a world that they steer too"
        )
    if ours.has_actions and not theirs.has_actions:
        raise ValueError(
            f"{config.initial} is steered by actions, and {config.data} has none beside its "
            "prompts: needed latents of clips with actions (scd encode)"
        )
    different = differences(to_json(theirs.of_actions), to_json(ours.of_actions))
    if different:
        raise ValueError(
            f"{config.data} has other actions than {config.initial} (its setting, then the "
            f"world's): {'; '.join(different[:2])}"
        )


def _fit_to_frames(config: TrainConfig, source: Source) -> TrainConfig:
    card = source.card
    if config.model.shape.channels != 3:
        raise ValueError(
            f"pixels have 3 channels, but this model works on latents of "
            f"{config.model.shape.channels}: encode {config.data} first (scd encode)"
        )
    shape = replace(config.model.shape, height=card.height, width=card.width)
    model = replace(config.model, shape=shape, conditions=card.conditions)
    autoencoder = config.autoencoder
    if not isinstance(autoencoder, PixelConfig):
        autoencoder = PixelConfig()
    PixelAutoencoder(autoencoder).latent_shape(card.height, card.width)
    begun_with = _begun_with(config)
    if begun_with is not None:
        begun_with = replace(begun_with, lapped=autoencoder.lapped)
        return replace(config, model=model, autoencoder=begun_with)
    loader = Loader(
        source,
        config.batch_size,
        config.num_frames,
        config.seed,
        on_error=config.data_on_error,
    )
    measured = PixelAutoencoder.measure(
        loader.batch(index).frames for index in range(NUM_MEASURED_BATCHES)
    )
    # Rounded, so that a rerun on another machine has the same settings to the last digit.
    scale = {"mean": round(measured.mean, 3), "std": round(measured.std, 3)}
    return replace(config, model=model, autoencoder=replace(autoencoder, **scale))


def _begun_with(config: TrainConfig) -> PixelConfig | None:
    """Return the pixel statistics with which the run in `config.out` was trained so far: they are
    kept where its data has changed. None: there is none, or it has other latents."""
    folder = Path(config.out)
    if not config.out or not (folder / LAST_FILE).is_file():
        return None
    with suppress(ValueError, OSError, AttributeError):
        return from_json(PixelConfig, read_json(folder / CONFIG_FILE).get("autoencoder"))
    # Refused where the run is continued.
    return None


def _decided(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that the data decides, by name."""
    parts = {
        "model.shape": (config.model.shape, ("height", "width")),
        "model.conditions": (config.model.conditions, None),
        "autoencoder": (config.autoencoder, None),
    }
    return {
        f"{where}.{name}": getattr(part, name)
        for where, (part, names) in parts.items()
        for name in names or [field.name for field in fields(part)]
    }


def load_initial(model: Diffuser, config: TrainConfig) -> None:
    """Give a run's model the averaged weights of `config.initial`; refuse those for another model
    or other latents with the first difference (ValueError)."""
    folder = resolve(config.initial)
    world = read_world_parts(folder)
    different = [
        line
        for line in differences(
            _settings(world["model"], world["autoencoder"]),
            _settings(config.model, config.autoencoder),
        )
        if not any(
            f"{line.split(':')[0]}.".startswith(f"{free}.")
            for free in (FREE_WAN_SETTINGS if config.model.takes_text else FREE_SETTINGS)
        )
    ]
    if different:
        # Another kind of model has other settings altogether: then the kind says it all.
        first = min(different, key=lambda line: ".kind:" not in line)
        raise ValueError(
            f"the weights of {config.initial} are for another model (its setting, then the run's): "
            f"{first}"
        )
    load_weights(model, folder / WEIGHTS_FILE)


def _settings(model: Any, autoencoder: Any) -> Any:
    return {"model": to_json(model), "autoencoder": to_json(autoencoder)}


def like_initial(config: TrainConfig, initial: str) -> TrainConfig:
    """Return a run of any Wan model with model, autoencoder and schedule of the world, run or step
    folder that it starts from."""
    folder = resolve(initial)
    world = read_world_parts(folder)
    autoencoder = world["autoencoder"]
    if not world["model"].takes_text:
        raise ValueError(f"{initial} is not a Wan world (scd convert wan writes one)")
    # A world that was moved together with its parts still names the place where it was made.
    beside = parts_beside(initial)
    # Absolute: the run is used from other folders than the one where it was trained.
    source = str(Path(beside).resolve()) if beside else autoencoder.source
    autoencoder = replace(autoencoder, source=source)
    return replace(
        config,
        initial=initial,
        model=world["model"],
        autoencoder=autoencoder,
        sampling=world["sampling"],
    )
