"""Environments of Gymnasium by their names: found, made so that they give pictures, described."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from contextlib import suppress
from enum import EnumMeta
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, UnregisteredEnv

from scd.common.names import did_you_mean
from scd.data.spaces import ConditionSpec

PACKAGES = {
    "ALE/": "ale_py",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "Crafter": "scd.data.environments.crafter",
}
"""How names of environments begin, and the modules that give Gymnasium these."""

FramesFrom = Literal["render", "observation"]
"""Which pictures are the frames: what an environment draws, or what an agent observes."""

INSTALL = 'pip install -e ".[gym]"'

CONSOLE_FPS = 60
"""Pictures per second of the console that ALE imitates."""

CAR_RACING = (("none", "right", "left", "gas", "brake"), ("steer", "gas", "brake"))
"""What its page calls its actions, and the entries of a continuous one."""


def make(
    name: str, frames_from: FramesFrom, arguments: Sequence[str], modules: Sequence[str]
) -> gymnasium.Env[Any, Any]:
    """Make an environment that gives pictures.

    Args:
        name: as `gymnasium.make` takes it.
        frames_from: where the pictures come from.
        arguments: of the environment, each as KEY=VALUE.
        modules: imported before, which give Gymnasium environments.

    Raises:
        ValueError: no such name, a package is not installed, arguments that the environment does
            not take, or no render mode `rgb_array` where frames are what it draws.
    """
    find(name, modules)
    draws = frames_from == "render"
    try:
        env = gymnasium.make(
            name,
            disable_env_checker=True,
            render_mode="rgb_array" if draws else None,
            **dict(map(_argument, arguments)),
        )
    except DependencyNotInstalled as error:
        raise ValueError(f"{name} needs a package: {INSTALL} ({error})") from error
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs the package {error.name}: {_pip(error)}") from error
    except (TypeError, gymnasium.error.Error) as error:
        if draws and "unexpected keyword argument 'render_mode'" in str(error):
            raise ValueError(_without_pictures(name, [])) from error
        raise ValueError(f"{name} cannot be made so: {error}") from error
    modes = list((env.metadata or {}).get("render_modes") or [])
    if draws and (env.render_mode != "rgb_array" or "rgb_array" not in modes):
        env.close()
        raise ValueError(_without_pictures(name, modes))
    return env


def _pip(error: ModuleNotFoundError) -> str:
    """Return the line that installs what an import missed."""
    known = {module.split(".")[-1] for module in PACKAGES.values()} | {"Box2D", "pygame"}
    return INSTALL if error.name in known else f"pip install {error.name}"


def _without_pictures(name: str, modes: Sequence[str]) -> str:
    came = ", ".join(map(str, modes)) or "none"
    return (
        f"{name} needs the render mode rgb_array, got {came}. "
        "If its observations are pictures, use --frames-from observation"
    )


def find(name: str, modules: Sequence[str]) -> None:
    """Give Gymnasium the environments of packages, and see that one is among them (ValueError)."""
    known = [module for start, module in PACKAGES.items() if name.startswith(start)]
    for module in (*modules, *known):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} needs the package {error.name}: {_pip(error)}") from error
    if _is_registered(name):
        return
    for module in dict.fromkeys(PACKAGES.values()):
        with suppress(ImportError):
            importlib.import_module(module)
    if not _is_registered(name):
        hint = did_you_mean(name, gymnasium.registry) or "."
        raise ValueError(
            f"Gymnasium knows no environment {name!r}{hint} The module of a package that adds "
            "some is given by --register MODULE"
        )


def _is_registered(name: str) -> bool:
    try:
        gymnasium.spec(name)
    except UnregisteredEnv:
        return False
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs the package {error.name}: {_pip(error)}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"{name!r} is no name of an environment: {error}") from error
    return True


def _argument(pair: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value is a number, a truth value, a tuple, ... or else a text."""
    key, _, text = pair.partition("=")
    with suppress(ValueError, SyntaxError):
        return key, ast.literal_eval(text)
    return key, text


def check_picture(picture: Any, name: str, frames_from: FramesFrom) -> np.ndarray:
    """Refuse what is no 8-bit RGB picture (ValueError)."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        if picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
            return picture
    if isinstance(picture, (np.ndarray, np.generic)):
        came = f"{picture.dtype} {list(picture.shape)}"
    elif isinstance(picture, dict):
        came = f"a dictionary of {', '.join(map(str, picture))}"
    else:
        came = type(picture).__name__
    hint = "" if frames_from == "render" else "; what it draws is --frames-from render"
    raise ValueError(
        f"{name}: frames are 8-bit RGB pictures [rows, columns, 3], got {came} as its "
        f"{frames_from}{hint}"
    )


def fps_of(env: gymnasium.Env[Any, Any]) -> float:
    """Return how many steps an environment means by a second; 0: it does not say."""
    game: Any = env.unwrapped
    if hasattr(game, "ale") and hasattr(game, "_frameskip"):
        # ALE says 30 whatever its frame skip.
        return CONSOLE_FPS / float(np.mean(game._frameskip))
    return float((env.metadata or {}).get("render_fps") or 0)


def own_names(game: Any, spec: ConditionSpec) -> tuple[str, ...]:
    """Return what an environment calls its actions, or the entries of one; else numbers."""
    num, found = spec.num_actions or spec.action_dim, []
    if spec.num_actions:
        if hasattr(game, "get_action_meanings"):
            found.append(game.get_action_meanings())
        found += [getattr(game, name, ()) for name in ("actions", "Actions", "action_names")]
    if type(game).__name__ == "CarRacing":
        found += CAR_RACING
    for names in found:
        if isinstance(names, EnumMeta):
            names = [entry.name for entry in names]  # type: ignore[attr-defined]
        if isinstance(names, Sequence) and len(names) == num:
            return tuple(str(name).lower() for name in names)
    return spec.action_names or tuple(f"action {number}" for number in range(num))
