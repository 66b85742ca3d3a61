"""Saving and loading of a model as config.json and model.safetensors, locally or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scd.atomic import file_aside, write_file
from scd.config import from_json, to_json

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
        model = cls(from_json(cls.config_class, settings["model"], "model"))  # type: ignore[call-arg]
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
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else settings
        raise ValueError(f"{path}: needed format {FORMAT!r}, got {found!r}")
    if "model" not in settings:
        raise ValueError(f"{path}: missing field 'model'")
    return settings


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights aside, then rename."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with file_aside(path) as aside:
        save_file(state, aside)


def load_weights(model: nn.Module, path: Path, device: str = "cpu") -> None:
    """Load a model's weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off or no safetensors file, or holds another architecture's weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model weights at {path}")
    try:
        state = load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    check_state(model, state, str(path))
    model.load_state_dict(state)
    model.to(device)


def check_state(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Refuse weights whose names or shapes are not the model's (ValueError, with examples)."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
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
