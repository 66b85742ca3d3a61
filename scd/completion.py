"""Completion of commands, names and flags in a shell: a script that tyro writes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from typing import Annotated, Any, Literal, Union

import tyro

from scd.bench.settings import BenchConfig
from scd.convert.settings import (
    ConvertAutoencoderConfig,
    ConvertWanConfig,
    ReferenceConfig,
)
from scd.data.record import recordings
from scd.data.settings import CheckConfig
from scd.demo.settings import DemoConfig
from scd.evaluation.protocols import EvaluateConfig, WeightsConfig
from scd.export.settings import FORMATS
from scd.preprocessing.settings import EncodeConfig
from scd.probing.interventions import DiagonalConfig, RecomposeConfig, SkipConfig
from scd.probing.settings import ProbeConfig
from scd.sampling.settings import SampleConfig, VBenchConfig
from scd.serving.settings import PlayConfig, ServeConfig
from scd.training.config import TrainAutoencoderConfig, TrainInverseDynamicsConfig
from scd.training.presets import DISTILLATIONS, PRESETS, TrainCommand


def print_completion(shell: str) -> None:
    """Print the script for one shell.

    Args:
        shell: bash, zsh or fish.
    """
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            {
                name: _one_of(kinds) if isinstance(kinds, Mapping) else kinds
                for name, kinds in settings_of_commands().items()
            },
            prog="scd",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.AvoidSubcommands,),
        )
    # tyro 1.0 offers each further line of a help text as if it were a flag of its own.
    for line in printed.getvalue().splitlines():
        print(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line)


def settings_of_commands() -> dict[str, Any]:
    """Return the settings of each command, or, by name, of each thing that it takes first."""
    return {
        "demo": DemoConfig,
        "play": PlayConfig,
        "record": recordings(),
        "data": _after_word("check", CheckConfig),
        "encode": EncodeConfig,
        "train": {name: TrainCommand(run=run) for name, run in PRESETS.items()},
        "distill": _flags_or_words(DISTILLATIONS[""][0], _of_words(DISTILLATIONS)),
        "sample": SampleConfig,
        "vbench": VBenchConfig,
        "serve": ServeConfig,
        "train-autoencoder": TrainAutoencoderConfig,
        "train-judge": TrainInverseDynamicsConfig,
        "evaluate": EvaluateConfig,
        "protocols": lambda: None,
        "worlds": lambda: None,
        "weights": {"i3d": WeightsConfig, "list": lambda: None},
        "probe": ProbeConfig,
        "bench": BenchConfig,
        "intervene": {"skip": SkipConfig, "diagonal": DiagonalConfig, "recompose": RecomposeConfig},
        "convert": {
            "reference": ReferenceConfig,
            "autoencoder": ConvertAutoencoderConfig,
            "wan": ConvertWanConfig,
        },
        "export": FORMATS,
    }


def _after_word(word: str, settings: type) -> Callable[..., None]:
    """Return what tyro reads as one fixed word and then the flags of settings."""

    def command(action: Any, settings: Any) -> None: ...

    command.__annotations__ = {
        "action": tyro.conf.Positional[Literal[word]],
        "settings": Annotated[settings, tyro.conf.arg(name="")],
    }
    return command


def _of_words(choices: Mapping[str, tuple[Any, ...]]) -> dict[str, type]:
    """Return the settings of the choices that begin with a word."""
    return {word: kind for word, (kind, *_) in choices.items() if word}


def _flags_or_words(settings: type, kinds: Mapping[str, type]) -> Callable[..., None]:
    """Return what tyro reads as the flags of settings, or a name and that name's flags."""

    def command(settings: Any, named: Any) -> None: ...

    nameless = tyro.conf.arg(name="")
    command.__annotations__ = {
        "settings": Annotated[settings, nameless],
        "named": Annotated[_one_of(kinds), nameless],
    }
    return command


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """Return what tyro reads as a name and then the flags of that name's settings."""
    options = []
    for name, settings in kinds.items():
        default = {} if isinstance(settings, type) else {"default": settings}
        kind = settings if isinstance(settings, type) else type(settings)
        options.append(
            Annotated[kind, tyro.conf.subcommand(name=name, prefix_name=False, **default)]
        )
    return Union[tuple(options)]  # noqa: UP007
