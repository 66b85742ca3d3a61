"""Saving and loading of a model as config.json and model.safetensors, locally or on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import save_file
from torch import nn

from scd import __version__
from scd.common.config import from_json, shown, to_json
from scd.common.files import file_aside, read_json, write_file
from scd.common.weights import StoredWeights

FORMAT = "scd-1"
"""Name and version of the layout of config.json."""
CONFIG_FILE = "config.json"
"""Settings of the model, under "model"; what else a user of the weights needs lies beside them."""
WEIGHTS_FILE = "model.safetensors"
"""Weights of the model."""


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
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        **ignored: Any,
    ) -> Pretrained:
        paths = {}
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            paths[name] = Path(model_id) / name
            if not Path(model_id).is_dir():
                paths[name] = Path(
                    hf_hub_download(
                        repo_id=model_id,
                        filename=name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
        settings = read_settings(paths[CONFIG_FILE])
        config = from_json(cls.config_class, settings["model"], "model")
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_weights(model, paths[WEIGHTS_FILE], map_location)
        return model.eval()


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
        save_file(state, aside)


def load_weights(model: nn.Module, path: Path, device: str = "cpu") -> None:
    """Load a model's weights, one after another, and move the model.

    A model that was built without weights, on the device "meta", takes them in the type in which
    they were stored; one that has some keeps its own.

    Raises:
        FileNotFoundError: there is no such file, or not all of several.
        ValueError: it is cut off or no safetensors file, or holds another architecture's weights.
    """
    empty = any(weight.is_meta for weight in model.parameters())
    with StoredWeights(path) as stored:
        shapes = {name: stored.shape(name) for name in stored.names()}
        check_shapes(model, shapes, str(path))
        for name in stored.names():
            weight = {name: stored.get(name).to(device) if empty else stored.get(name)}
            model.load_state_dict(weight, strict=False, assign=empty)
    model.to(device)


def check_state(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Refuse weights whose names or shapes are not the model's (ValueError, with examples)."""
    check_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, where)


def check_shapes(model: nn.Module, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse names or shapes that are not those of a model's weights (ValueError)."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"{len(names)} {what} such as {sorted(names)[0]!r}"
        for what, names in (
            ("missing weights", needed.keys() - given.keys()),
            ("unknown weights", given.keys() - needed.keys()),
        )
        if names
    ]
    problems += [
        f"{name!r} of shape {given[name]} where {needed[name]} is needed"
        for name in sorted(needed.keys() & given.keys())
        if needed[name] != given[name]
    ][:1]
    if problems:
        raise ValueError(f"{where} is of another architecture: {'; '.join(problems)}")
