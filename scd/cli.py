"""The command `scd`: one function per subcommand, every field of its settings a flag.

What a command needs is imported when it is called, so that help and wrong usage answer at once.

Exit status: 0 success, 2 wrong usage or bad input (one message on stderr), 1 a fault of ours or a
full GPU, 130 or 143 interrupted by SIGINT or SIGTERM, 141 when who read the output left, as `head`.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from scd import __version__
from scd.common.config import refuse_non_finite
from scd.common.launcher import first_speaks, is_first, rank, refuse_several
from scd.common.names import known
from scd.common.signals import Interrupted
from scd.common.words import asks_for_help, name_among, split_name, to_front, value_of
from scd.usage import USAGE

Settings = TypeVar("Settings")

NO_READER = 141
"""Exit status when nobody reads the output any more: what a shell reports of SIGPIPE."""

SHELLS = ("bash", "zsh", "fish")
"""Shells whose completion can be printed."""

SHARED = ("train", "distill", "encode", "evaluate", "vbench")
"""Commands whose work several processes share, started by torchrun and its like."""

FIRST_SPEAKS_S = 10.0
"""Seconds for which a process that is not the first waits before it says what is wrong. Mostly all
stop by the same, and what started them ends the others when the first one does."""

FULL_GPU = (
    "the memory of the GPU is full: lower --batch-size or --num-frames; in training also: "
    "--num-accumulation (makes up for a smaller batch) and --gradient-checkpointing"
)
"""What to do when a GPU has too little memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: after the program's name; None: those of this process.
    """
    try:
        try:
            with first_speaks():
                return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            # Also after a help text, which leaves by SystemExit: Python would complain at its end.
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be written goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return NO_READER


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"scd {__version__}")
        return 0
    try:
        if words[0] == "--print-completion":
            _print_completion(words[1:])
        else:
            command = known(words[0], "command", [*COMMANDS, "help"])
            if command not in SHARED and not asks_for_help(words):
                refuse_several(command)
            COMMANDS[command](_with_source_flags(words[1:]))
    except BrokenPipeError as error:
        # Another pipe or connection may have broken than the one to who reads the output.
        if _nobody_reads():
            raise
        return _refuse(str(error))
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except Interrupted as stop:
        return _refuse(str(stop), status=stop.exit_status)
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)
    except Exception as error:
        # By its name, since a command that got as far as this error has imported torch, and
        # others need not.
        if type(error).__name__ == "OutOfMemoryError":
            return _refuse(f"{FULL_GPU} ({str(error).splitlines()[0]})", status=1)
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return _refuse("the memory of the machine is full: ask for less at once", status=1)
        traceback.print_exc()
        return 1
    return 0


def _nobody_reads() -> bool:
    """Tell whether the output is a pipe that was closed at its other end."""
    watched = select.poll()
    try:
        watched.register(sys.stdout, 0)
    except (OSError, ValueError):
        return False
    return any(events & select.POLLERR for _, events in watched.poll(0))


def _refuse(message: str, status: int = 2) -> int:
    """Say in one sentence why the command ended; of several processes one does."""
    if is_first():
        print(f"scd: {message}", file=sys.stderr)
    elif status in (1, 2):
        time.sleep(FIRST_SPEAKS_S)
        print(f"scd: process {rank()}: {message}", file=sys.stderr)
    return status


def _parse(
    kind: type[Settings], words: list[str], command: str, default: Settings | None = None
) -> Settings:
    """Read flags into settings; wrong usage leaves with status 2."""
    import tyro

    # A preset fixes which kind of model there is; that kind's fields are the flags.
    with first_speaks(errors=True):
        settings = tyro.cli(
            kind,
            args=words,
            prog=f"scd {command}",
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )
    assert settings is not None
    refuse_non_finite(settings)
    return settings


def _parse_known(
    kind: type[Settings], words: list[str], command: str
) -> tuple[Settings, list[str]]:
    """Read the flags that settings know, and return the others."""
    import tyro

    with first_speaks(errors=True):
        return tyro.cli(kind, args=words, prog=f"scd {command}", return_unknown_args=True)


def _with_source_flags(words: list[str]) -> list[str]:
    """Put flags of a kind of clips into its name: `flags_to_name`."""
    if any(word.partition(":")[1] for word in words):
        from scd.data.source import flags_to_name

        return flags_to_name(words)
    return words


def _loose(kind: type, words: list[str], default: Any = None) -> list[str]:
    """Return what is neither a flag of settings nor the value of one, in its order."""
    import tyro

    config = (tyro.conf.AvoidSubcommands,)
    with first_speaks(errors=True):
        return tyro.cli(kind, args=words, default=default, return_unknown_args=True, config=config)[
            1
        ]


def _without_flag(flag: str, words: list[str], kind: type, default: Any = None) -> list[str]:
    """Let the value of one flag stand without it: first, or anywhere among the other flags."""
    if value_of(words, flag) is not None:
        return words
    words = to_front(words, lambda: name_among(_loose(kind, [flag, "?", *words], default)))
    return [flag, *words] if words and not words[0].startswith("-") else words


def _with_run(words: list[str], command: str, kind: type, default: Any = None) -> list[str]:
    """Let the value of --run stand without the flag, and refuse a command without it."""
    words = _without_flag("--run", words, kind, default)
    if value_of(words, "--run") is None and not asks_for_help(words):
        raise ValueError(
            f"scd {command} needs a RUN first: the folder of a run or of a world; "
            f"scd help {command} explains every flag"
        )
    return words


def _demo(words: list[str]) -> None:
    from scd.demo.settings import DemoConfig

    config = _parse(DemoConfig, _without_flag("--world", words, DemoConfig), "demo")
    from scd.demo.demo import demo

    demo(config)


def _record(words: list[str]) -> None:
    from scd.data.record import record, recordings

    kinds = recordings()
    name, rest = split_name(words, "record", "world", kinds)
    if name is None:
        print(f"usage: scd record {{{','.join(kinds)}}} --out DIR ...; try scd record toy --help")
        return
    if name == "gym":
        # Frames are counted, and named by where they are from: no word can mean both.
        for place, word in enumerate(rest[:-1]):
            if word == "--frames" and rest[place + 1] in ("render", "observation"):
                rest[place] = "--frames-from"
        rest = _without_flag("--env", rest, kinds[name])
    record(_parse(kinds[name], rest, f"record {name}"))


def _data(words: list[str]) -> None:
    from scd.data.settings import CheckConfig

    name, rest = split_name(words, "data", "action", ["check", "export"])
    if name == "export":
        return _export_data(rest)
    config = _parse(CheckConfig, rest if name else ["--help"], "data check")
    from scd.data.check import check, readable, refusal

    if config.preset:
        from scd.training.presets import PRESETS

        preset = PRESETS[known(config.preset, "preset", PRESETS)]
        config = replace(config, preset="", num_frames=preset.num_frames)
    findings = check(config)
    print(readable(config, findings))
    if refused := refusal(config, findings):
        raise ValueError(refused)


def _export_data(words: list[str]) -> None:
    from scd.data.lerobot_export import ExportConfig, export_lerobot, readable

    name, rest = split_name(words, "data export", "format", ["lerobot"])
    config = _parse(ExportConfig, rest if name else ["--help"], "data export lerobot")
    print(readable(export_lerobot(config), config.out))


def _encode(words: list[str]) -> None:
    from scd.preprocessing.settings import EncodeConfig

    config = _parse(EncodeConfig, _without_flag("--data", words, EncodeConfig), "encode")
    from scd.preprocessing.encode import encode, readable

    print(readable(encode(config)))


def _train(words: list[str]) -> None:
    from scd.training.presets import PRESETS, TrainCommand

    toy = TrainCommand(run=PRESETS["toy"])
    words = to_front(words, lambda: name_among(_loose(TrainCommand, words, toy)))
    name, rest = split_name(words, "train", "preset", PRESETS)
    if name is None:
        print(f"scd train PRESET ...; presets: {', '.join(PRESETS)}. Flags, as of preset toy:\n")
    base = PRESETS[name or "toy"]
    initial = value_of(rest, "--initial")
    if base.model.takes_text and initial:
        from scd.training.fit import like_initial

        base = like_initial(base, initial)
    settings = _parse(TrainCommand, rest, f"train {name or 'PRESET'}", TrainCommand(run=base))
    from scd.training.fit import fitted
    from scd.training.plan import dry_run

    config = fitted(settings.run, base, needs_data=not settings.dry_run)
    if settings.dry_run:
        dry_run(config)
        return
    if config.model.takes_text and not config.initial:
        raise ValueError(
            f"scd train {name} needs --initial RUN, a Wan world (scd convert wan), and --data "
            "LATENTS (scd encode)"
        )
    _run_training(config)


def _run_training(config: Any) -> None:
    from scd.training.world import train

    print(f"saved {train(config)}")


def _help_of_both(kind: type, command: str, base: Any, note: str) -> None:
    """Print the help of a choice, and of the run that the choice makes; leave."""
    with suppress(SystemExit):
        _parse_known(kind, ["--help"], command)
    print(f"\nBesides, every field of the run, here as without {note}:\n")
    _parse(type(base), ["--help"], command, base)


def _teacher(kind: type[Settings], words: list[str], base: Any) -> Settings:
    """Read a choice among the flags of the run that it makes."""
    return _parse_known(kind, _loose(type(base), words, base), "distill")[0]


def _distill(words: list[str]) -> None:
    from scd.training.config import TrainConfig
    from scd.training.presets import DISTILLATIONS

    name = words[0] if words[:1] and words[0] in DISTILLATIONS else ""
    kind, blank, first, note = DISTILLATIONS[name]
    command, words = f"distill {name}".strip(), words[bool(name) :]
    if asks_for_help(words):
        _help_of_both(kind, f"{command} {first.upper()}", blank, note)
    words = to_front(words, lambda: getattr(_teacher(kind, words, blank), first))
    choice: Any
    choice, rest = _parse_known(kind, words, command)
    from scd.training.distillation import distillation

    config = distillation(choice)
    config = _parse(TrainConfig, rest, f"{command} {getattr(choice, first)}", config)
    if name == "wan-dmd":
        from scd.training.wan import with_prompts

        config, info = with_prompts(choice, config)
        if choice.only_embed:
            print(f"{len(info.prompts)} prompts in {config.data}")
            return
    _run_training(config)


def _sample(words: list[str]) -> None:
    from scd.sampling.settings import PromptSampleConfig, SampleConfig

    takes_text = value_of(words, "--prompt") is not None
    words = _with_run(words, "sample", PromptSampleConfig if takes_text else SampleConfig)
    if asks_for_help(words):
        with suppress(SystemExit):
            _parse(SampleConfig, ["--help"], "sample RUN")
        print("\nA run that a text steers takes these instead:\n")
        _parse(PromptSampleConfig, ["--help"], "sample RUN --prompt TEXT")
    from scd.sampling.sample import readable_speed, sample, sample_prompt
    from scd.sampling.text_to_video import is_steered_by_text

    run = value_of(words, "--run")
    if takes_text or (run and is_steered_by_text(run)):
        result = sample_prompt(_parse(PromptSampleConfig, words, "sample"))
        print(f"{readable_speed(result)}\nsaved {result['settings']['out']}")
        return
    result = sample(_parse(SampleConfig, words, "sample"))
    print(
        f"{result['frames']} frames at {result['frames_per_second']:.2f} per second in "
        f"{result['settings']['precision']}, the first after "
        f"{result['time_to_first_frame_s']:.3f} s; saved {result['settings']['out']}"
    )


def _vbench(words: list[str]) -> None:
    from scd.sampling.settings import VBenchConfig

    config = _parse(VBenchConfig, _with_run(words, "vbench", VBenchConfig), "vbench")
    from scd.sampling.vbench import vbench

    print(f"rendered {vbench(config)} videos into {config.out}")


def _evaluate(words: list[str]) -> None:
    from scd.evaluation.protocols import PROTOCOLS, EvaluateConfig

    name = value_of(words, "--protocol")
    chosen = PROTOCOLS["custom" if name is None else known(name, "protocol", PROTOCOLS)]
    program = "evaluate" if name is None else f"evaluate --protocol {name}"
    default = EvaluateConfig(protocol=chosen)
    words = _with_run(words, "evaluate", EvaluateConfig, default)
    config = _parse(EvaluateConfig, words, program, default)
    from scd.evaluation.evaluate import evaluate, readable

    result = evaluate(config)
    if result is not None:
        print(readable(result))
        print(f"saved {result['settings']['out']}")


def _protocols(words: list[str]) -> None:
    from scd.evaluation.protocols import listing

    if asks_for_help(words):
        print("usage: scd protocols\n\nLists the protocols of scd evaluate --protocol NAME.")
        return
    if words:
        raise ValueError(f"scd protocols takes nothing else, got {' '.join(words)}")
    print(listing())


def _worlds(words: list[str]) -> None:
    if asks_for_help(words):
        print("usage: scd worlds [--json]\n\nLists the worlds that come with the package.")
        return
    if words not in ([], ["--json"]):
        raise ValueError(f"scd worlds takes --json or nothing, got {' '.join(words)}")
    from scd.models.shelf import as_json, listing, shipped_worlds

    worlds = shipped_worlds()
    print(json.dumps(as_json(worlds), indent=2) if words else listing(worlds))


def _weights(words: list[str]) -> None:
    from scd.evaluation.protocols import WeightsConfig

    name, rest = split_name(words, "weights", "name", ["i3d", "list"])
    config = _parse(WeightsConfig, rest, f"weights {name or 'i3d'}")
    from scd.evaluation.fetch import weights

    print(weights(name or "i3d", config))


def _play(words: list[str]) -> None:
    from scd.serving.settings import PlayConfig

    config = _parse(PlayConfig, _without_flag("--run", words, PlayConfig), "play")
    from scd.serving.run import play

    play(config)


def _train_autoencoder(words: list[str]) -> None:
    from scd.training.config import TrainAutoencoderConfig

    config = _parse(TrainAutoencoderConfig, words, "train-autoencoder")
    from scd.training.autoencoder import readable, train_autoencoder

    print(readable(train_autoencoder(config)))
    print(f"saved {config.out}")


def _train_judge(words: list[str]) -> None:
    from scd.training.config import TrainInverseDynamicsConfig

    config = _parse(TrainInverseDynamicsConfig, words, "train-judge")
    from scd.training.inverse_dynamics import readable, train_inverse_dynamics

    print(readable(train_inverse_dynamics(config).held_out))
    print(f"saved {config.out}")


def _probe(words: list[str]) -> None:
    from scd.probing.settings import ProbeConfig

    config = _parse(ProbeConfig, _with_run(words, "probe", ProbeConfig), "probe")
    from scd.probing.run import probe

    probe(config)


def _serve(words: list[str]) -> None:
    from scd.serving.settings import ServeConfig

    config = _parse(ServeConfig, _without_flag("--run", words, ServeConfig), "serve")
    if config.replicas is None:
        from scd.serving.run import serve

        serve(config)
    else:
        from scd.serving.ray_app import serve_replicas

        serve_replicas(config)


def _convert(words: list[str]) -> None:
    from scd.convert.settings import ConvertAutoencoderConfig, ConvertWanConfig, ReferenceConfig

    name, rest = split_name(words, "convert", "layout", ["reference", "autoencoder", "wan"])
    if name == "autoencoder":
        rest = _without_flag("--file", rest, ConvertAutoencoderConfig)
        chosen = _parse(ConvertAutoencoderConfig, rest, "convert autoencoder")
        from scd.convert.reference import convert_autoencoder

        print(f"saved {convert_autoencoder(chosen)}")
        return
    if name == "wan":
        wanted = _parse(ConvertWanConfig, rest, "convert wan")
        from scd.convert.wan import convert_wan, plan_wan

        done = json.dumps(plan_wan(wanted), indent=2) if wanted.dry_run else convert_wan(wanted)
        print(done if wanted.dry_run else f"saved {done}")
        return
    if asks_for_help(rest):
        print("usage: scd convert reference STATE_DICT OUT ...")
        print("   or: scd convert autoencoder STATE_DICT --out DIR ...; try --help after it")
        print("   or: scd convert wan --model MODEL --out DIR ...; try --help after it\n")
        _parse(ReferenceConfig, ["--help"], "convert reference STATE_DICT OUT")
    paths = [word for word in rest[:2] if not word.startswith("-")]
    if len(paths) < 2:
        raise ValueError("scd convert reference needs a state dict and a folder to write")
    config = _parse(ReferenceConfig, rest[2:], "convert reference STATE_DICT OUT")
    from scd.convert.reference import convert_reference

    print(f"saved {convert_reference(paths[0], paths[1], config)}")


def _export(words: list[str]) -> None:
    from scd.export.settings import FORMATS

    name, rest = split_name(words, "export", "format", FORMATS)
    if name is None:
        return print(f"usage: scd export {{{','.join(FORMATS)}}} RUN --out DIR ...")
    kind, command = FORMATS[name], f"export {name}"
    config = _parse(kind, _with_run(rest, command, kind), command)
    if name == "diffusers":
        from scd.convert.export import export
    else:
        from scd.export.run import export
    export(config)


def _bench(words: list[str]) -> None:
    from scd.bench.settings import BenchConfig, CompareConfig

    if words[:1] == ["compare"]:
        comparison = _parse(CompareConfig, words[1:], "bench compare")
        from scd.bench.compare import compare

        compare(comparison)
        return
    if words and not words[0].startswith("-"):
        raise ValueError(f"scd bench takes flags, or compare first; got {words[0]!r}")
    config = _parse(BenchConfig, words, "bench")
    from scd.bench.measure import bench

    bench(config)


def _intervene(words: list[str]) -> None:
    from scd.probing.interventions import DiagonalConfig, RecomposeConfig, SkipConfig

    kinds = {"skip": SkipConfig, "diagonal": DiagonalConfig, "recompose": RecomposeConfig}
    name, rest = split_name(words, "intervene", "kind", kinds)
    if name is None:
        print(f"usage: scd intervene {{{','.join(kinds)}}} RUN --out DIR ...")
        print("try scd intervene skip --help")
        return
    command = f"intervene {name}"
    config = _parse(kinds[name], _with_run(rest, command, kinds[name]), command)
    from scd.probing.compare import intervene, markdown

    print(markdown(intervene(config)))
    print(f"saved {config.comparison.out}")


def _print_completion(words: list[str]) -> None:
    if len(words) != 1:
        raise ValueError(f"scd --print-completion takes one shell: {', '.join(SHELLS)}")
    shell = known(words[0], "shell", SHELLS)
    from scd.completion import print_completion

    print_completion(shell)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "worlds": _worlds,
    "play": _play,
    "record": _record,
    "data": _data,
    "encode": _encode,
    "train": _train,
    "distill": _distill,
    "sample": _sample,
    "vbench": _vbench,
    "serve": _serve,
    "train-autoencoder": _train_autoencoder,
    "train-judge": _train_judge,
    "evaluate": _evaluate,
    "protocols": _protocols,
    "weights": _weights,
    "probe": _probe,
    "bench": _bench,
    "intervene": _intervene,
    "convert": _convert,
    "export": _export,
}
"""Subcommands by name."""
