"""Saving and loading of a model as config.json and model.safetensors, locally or on the Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from scd import __version__
from scd.common.config import from_json, shown, to_json
from scd.common.files import file_aside, read_json, write_file
from scd.common.hub import download
from scd.common.names import refuse_unknown
from scd.common.runtime import without_weights
from scd.common.weights import Weights, check_fit, headers, save_tensors
from scd.models.lora import has_lora, merged

FORMAT = "scd-1"
"""Name and version of the layout of config.json."""
CONFIG_FILE = "config.json"
"""Settings of the model, under "model"; what else a user of the weights needs lies beside them."""
WEIGHTS_FILE = "model.safetensors"
"""Weights of the model."""

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of numbers that a loaded model may be asked for."""


Model = TypeVar("Model", bound="Pretrained")


class Pretrained(PyTorchModelHubMixin):
    """Gives a model `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The model's class names its dataclass of settings as `config_class` and holds one as `config`.
    """

    config_class: type
    config: Any

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        settings = {"format": FORMAT, "model": to_json(self.config)}
        write_file(Path(save_directory) / CONFIG_FILE, json.dumps(settings, indent=2))
        save_weights(self, Path(save_directory) / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        map_location: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unknown: Any,
    ) -> Model:
        """Read a model, as `save_pretrained` wrote it.

        Args:
            pretrained_model_name_or_path: its folder, or its name on the hub.
            revision: branch, tag or commit on the hub; None: the newest.
            dtype: type of its weights: torch.float32, torch.float16, torch.bfloat16 or one of their
                names; None, "auto": as they are stored.
            torch_dtype: the same, by its older name.
            map_location: device on which they are put.
            cache_dir: folder for what is downloaded; None: the hub's own.
            force_download: download what is there already.
            local_files_only: do not ask the hub.
            token: of an account that may read.
            unknown: refused.

        Raises:
            FileNotFoundError: there is none, or the hub cannot be reached.
            ValueError: damaged files, another kind of model, or an argument that there is not.
        """
        refuse_unknown(unknown, cls.from_pretrained)
        wanted = choose_dtype(dtype, torch_dtype)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(
                str(pretrained_model_name_or_path),
                (CONFIG_FILE, "model*.safetensors*"),
                revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        elif revision is not None:
            raise ValueError(
                f"revision {revision!r} has a meaning on the hub only, not for {folder}"
            )
        settings = read_settings(folder / CONFIG_FILE)
        config = from_json(cls.config_class, settings["model"], f"{folder / CONFIG_FILE}: model")
        with without_weights():
            model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_weights(model, folder / WEIGHTS_FILE, str(map_location))
        return model.to(dtype=wanted).eval()


def choose_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """Return the type of weights that is asked for by either name; None: as they are stored.

    Raises:
        ValueError: both names with other types, or one in which models do not run.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} mean the same: give one")
    given = torch_dtype if dtype is None else dtype
    if given is None or given == "auto":
        return None
    names = {str(one).removeprefix("torch."): one for one in WEIGHT_TYPES}
    word = str(given).removeprefix("torch.")
    if word not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)} or 'auto', got {given!r}")
    return names[word]


def read_settings(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, or holds no model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model settings at {path}")
    settings = read_json(path)
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        newer = re.fullmatch(r"scd-(\d+)", str(found))
        raise ValueError(
            f"{path}: needed format {FORMAT!r}, got {shown(found)}"
            + (f": a newer scd wrote it than this {__version__}, update scd" if newer else "")
        )
    if "model" not in settings:
        raise ValueError(f"{path}: missing field 'model'")
    return settings


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights aside, then rename."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with file_aside(path) as aside:
        save_tensors(state, aside)


def load_weights(model: nn.Module, path: Path, device: str = "cpu") -> None:
    """Load a model's weights, one after another, and move the model.

    A model that was built without weights, on the device "meta", takes them in the type in which
    they were stored; one that has some keeps its own.

    Raises:
        FileNotFoundError: there is no such file, or not all of several.
        ValueError: it is cut off or no file of weights, holds another architecture's weights, or
            numbers that are not finite.
    """
    empty = any(weight.is_meta for weight in model.parameters())
    with Weights(path, as_stored=True) as stored:
        if has_lora(stored.names()) and not has_lora(model.state_dict()):
            # What a training moves, as its checkpoint keeps it.
            state = merged(stored.state_dict())
            check_fit(model, headers(state), str(path))
            model.load_state_dict(state, assign=empty)
            model.to(device)
            return
        check_fit(model, headers(stored), str(path))
        for name in stored.names():
            weight = {name: stored.get(name).to(device) if empty else stored.get(name)}
            model.load_state_dict(weight, strict=False, assign=empty)
    model.to(device)
