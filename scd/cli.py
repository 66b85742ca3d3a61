"""The command `scd`: one function per subcommand, every field of its settings a flag.

Exit status: 0 success, 2 wrong usage or bad input (one message on stderr), 1 a fault of ours or a
full GPU, 130 or 143 interrupted by SIGINT or SIGTERM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import torch
import tyro
from rich.console import Console

from scd import __version__
from scd.bench.compare import CompareConfig, compare
from scd.bench.measure import BenchConfig, bench
from scd.common.processes import num_started
from scd.common.signals import Interrupted
from scd.convert.autoencoder import ConvertAutoencoderConfig, convert_autoencoder
from scd.convert.export import ExportConfig, export_diffusers
from scd.convert.reference import ReferenceConfig, convert_reference
from scd.convert.wan import ConvertWanConfig, convert_wan
from scd.data.check import CheckConfig, check, refusal
from scd.data.check import readable as readable_check
from scd.data.record import DoomRecording, ToyRecording, record
from scd.demo.demo import DemoConfig, demo
from scd.evaluation.evaluate import EvaluateConfig, evaluate, readable
from scd.evaluation.evaluate_protocol import evaluate_by_protocol
from scd.evaluation.evaluate_protocol import readable as readable_by_protocol
from scd.evaluation.protocol_settings import ProtocolConfig
from scd.evaluation.protocols import listing, protocol
from scd.objectives.distill import ConsistencyConfig
from scd.preprocessing.encode import encode
from scd.preprocessing.encode import readable as readable_encoding
from scd.preprocessing.settings import EncodeConfig
from scd.probing.compare import intervene
from scd.probing.intervention_settings import DiagonalConfig, RecomposeConfig, SkipConfig
from scd.probing.intervention_table import markdown
from scd.probing.run import probe
from scd.probing.settings import ProbeConfig
from scd.sampling.sample import SampleConfig, sample
from scd.sampling.sample_text import PromptSampleConfig, readable_speed, sample_prompt
from scd.sampling.text_to_video import is_steered_by_text
from scd.sampling.vbench import VBenchConfig, vbench
from scd.serving.play import PlayConfig, play
from scd.serving.ray_app import serve_replicas
from scd.serving.run import serve
from scd.serving.settings import ServeConfig
from scd.training.autoencoder import readable as readable_reconstruction
from scd.training.autoencoder import train_autoencoder
from scd.training.autoencoder_settings import TrainAutoencoderConfig
from scd.training.config import TrainConfig
from scd.training.distill import DistillChoice, distillation
from scd.training.fit import decides, fit_to_data, fit_window
from scd.training.initial import is_of_wan, like_initial
from scd.training.inverse_dynamics import TrainJudgeConfig, train_judge
from scd.training.inverse_dynamics import readable as readable_judge
from scd.training.plan import dry_run
from scd.training.presets import PRESETS, preset
from scd.training.trainer import train
from scd.training.wan import PRESET as WAN_DMD
from scd.training.wan import WanDmdChoice, wan_distillation, with_prompts

Settings = TypeVar("Settings")

USAGE = """usage: scd COMMAND ...

  demo                      stream and steer the world that comes with the package (seconds);
                            --train: train a small one and its dense twin, compare (minutes)
  play [RUN]                a world in the browser, steered by keyboard, mouse or touch
  record toy|doom           record clips with actions
  data check PATH           what there is of a collection of clips, and what is missing
  encode DATA               write the latents of clips once, for training
  train-autoencoder         train the network between pixels and latents
  train PRESET              train a model on clips
  distill TEACHER           make a student of a few steps per frame from a trained model
  serve [RUN]               a server of many streams: page, WebSocket, HTTP; without RUN of the
                            world that comes with the package
  sample RUN                stream frames from a trained model, or video of a prompt (--prompt)
  vbench RUN                videos of many prompts, in VBench's folder layout
  train-judge               train the network by which control is measured (minutes)
  evaluate RUN              measure a trained model on held-out clips
  protocols                 named protocols for evaluate --protocol, with every setting
  probe RUN                 what each layer of a trained model does, and where to split it
  bench                     seconds, memory and share of the machine's limit per frame
  bench compare             two configurations in turns, as a ratio with its spread
  intervene skip|diagonal|recompose RUN
                            change a trained dense model, finetune it and compare
  convert reference FILE    turn a state dict of the paper's release, or of FAR, into ours
  convert autoencoder FILE  turn weights of FAR's autoencoders into a folder for scd encode
  convert wan               make a causal world of Wan2.1: separable, or dense
  export diffusers RUN      turn a Wan world back into what diffusers loads

`scd COMMAND --help` explains every flag. `scd --version` prints the version."""

FULL_GPU = (
    "the memory of the GPU is full: lower --batch-size or --num-frames; in training also: "
    "--num-accumulation (makes up for a smaller batch) and --gradient-checkpointing"
)
"""What to do when a GPU has too little memory."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """One training run, or only its plan."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """The run."""
    dry_run: bool = False
    """Print all settings, parameters, arithmetic and memory as JSON, and do not train. Started by
    accelerate or torchrun, of as many processes as they start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: after the program's name; None: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"scd {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _refuse(f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}")
    try:
        COMMANDS[words[0]](words[1:])
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except Interrupted as stop:
        return _refuse(str(stop), status=stop.exit_status)
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)
    except torch.OutOfMemoryError as error:
        return _refuse(f"{FULL_GPU} ({str(error).splitlines()[0]})", status=1)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _refuse(message: str, status: int = 2) -> int:
    print(f"scd: {message}", file=sys.stderr)
    return status


def _parse(
    kind: type[Settings], words: list[str], command: str, default: Settings | None = None
) -> Settings:
    """Read flags into settings; wrong usage leaves with status 2."""
    # A preset fixes which kind of model there is; that kind's fields are the flags.
    settings = tyro.cli(
        kind,
        args=words,
        prog=f"scd {command}",
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )
    assert settings is not None
    return settings


def _split_name(
    words: list[str], command: str, what: str, choices: Sequence[str]
) -> tuple[str | None, list[str]]:
    """Take the leading name off; None if help is asked for without one."""
    if words and not words[0].startswith("-"):
        if words[0] not in choices:
            raise ValueError(f"unknown {what} {words[0]!r}; there are {', '.join(choices)}")
        return words[0], words[1:]
    if any(word in ("-h", "--help") for word in words):
        return None, words
    raise ValueError(f"scd {command} needs a {what} first: {', '.join(choices)}")


def _demo(words: list[str]) -> None:
    demo(_parse(DemoConfig, words, "demo"))


def _record(words: list[str]) -> None:
    kinds = {"toy": ToyRecording, "doom": DoomRecording}
    name, rest = _split_name(words, "record", "world", list(kinds))
    if name is None:
        print(f"usage: scd record {{{','.join(kinds)}}} --out DIR ...; try scd record toy --help")
        return
    record(_parse(kinds[name], rest, f"record {name}"))


def _data(words: list[str]) -> None:
    name, rest = _split_name(words, "data", "action", ["check"])
    if name is None:
        rest = ["--help"]
    config = _parse(CheckConfig, rest, "data check")
    findings = check(config)
    print(readable_check(config, findings))
    if findings.missing:
        raise ValueError(refusal(config, findings))


def _encode(words: list[str]) -> None:
    if words and not words[0].startswith("-"):
        words = ["--data", *words]
    print(readable_encoding(encode(_parse(EncodeConfig, words, "encode"))))


def _train(words: list[str]) -> None:
    name, rest = _split_name(words, "train", "preset", list(PRESETS))
    if name is None:
        print(f"scd train PRESET ...; presets: {', '.join(PRESETS)}. Flags, as of preset toy:\n")
    base = preset(name or "toy")
    initial = _value_of(rest, "--initial")
    if is_of_wan(base) and initial:
        base = like_initial(base, initial)
    settings = _parse(TrainCommand, rest, f"train {name or 'PRESET'}", TrainCommand(run=base))
    config = fit_window(settings.run, base)
    if decides(config):
        try:
            config = fit_to_data(settings.run, base)
        except OSError:
            if not settings.dry_run:
                raise
    if settings.dry_run:
        dry_run(config, num_started())
        return
    if is_of_wan(config) and not config.initial:
        raise ValueError(
            f"scd train {name} needs --initial RUN, a Wan world (scd convert wan), and --data "
            "LATENTS (scd encode)"
        )
    Console().print(f"saved {train(config)}")


def _distill(words: list[str]) -> None:
    if words[:1] == ["wan-dmd"]:
        _distill_wan(words[1:])
        return
    if any(word in ("-h", "--help") for word in words):
        with suppress(SystemExit):
            tyro.cli(DistillChoice, prog="scd distill", args=["--help"])
        print("\nBesides, every field of the run, here as without a teacher:\n")
        blank = TrainConfig(objective=ConsistencyConfig())
        _parse(TrainConfig, ["--help"], "distill TEACHER", blank)
    choice, rest = tyro.cli(DistillChoice, args=words, prog="scd distill", return_unknown_args=True)
    config = _parse(TrainConfig, rest, f"distill {choice.teacher}", distillation(choice))
    Console().print(f"saved {train(config)}")


def _distill_wan(words: list[str]) -> None:
    prog = "scd distill wan-dmd"
    if any(word in ("-h", "--help") for word in words):
        with suppress(SystemExit):
            tyro.cli(WanDmdChoice, prog=prog, args=["--help"])
        print("\nBesides, every field of the run, here as without a world:\n")
        _parse(TrainConfig, ["--help"], "distill wan-dmd RUN", WAN_DMD)
    choice, rest = tyro.cli(WanDmdChoice, args=words, prog=prog, return_unknown_args=True)
    base = wan_distillation(choice)
    config = _parse(TrainConfig, rest, f"distill wan-dmd {choice.run}", base)
    config, info = with_prompts(choice, config)
    if choice.only_embed:
        print(f"{len(info.prompts)} prompts in {config.data}")
        return
    Console().print(f"saved {train(config)}")


def _sample(words: list[str]) -> None:
    words = _run_first(words)
    if any(word in ("-h", "--help") for word in words):
        with suppress(SystemExit):
            _parse(SampleConfig, ["--help"], "sample RUN")
        print("\nA run that a text steers takes these instead:\n")
        _parse(PromptSampleConfig, ["--help"], "sample RUN --prompt TEXT")
    run = _value_of(words, "--run")
    if _value_of(words, "--prompt") is not None or (run and is_steered_by_text(run)):
        config = _parse(PromptSampleConfig, words, "sample")
        print(f"{readable_speed(sample_prompt(config))}\nsaved {config.out}")
        return
    config = _parse(SampleConfig, words, "sample")
    result = sample(config)
    print(
        f"{result['frames']} frames at {result['frames_per_second']:.2f} per second, the first "
        f"after {result['time_to_first_frame_s']:.3f} s; saved {config.out}"
    )


def _vbench(words: list[str]) -> None:
    config = _parse(VBenchConfig, _run_first(words), "vbench")
    print(f"rendered {vbench(config)} videos into {config.out}")


def _evaluate(words: list[str]) -> None:
    name = _value_of(words, "--protocol")
    if name is not None:
        _evaluate_by_protocol(words, name)
        return
    if any(word in ("-h", "--help") for word in words):
        with suppress(SystemExit):
            _parse(EvaluateConfig, ["--help"], "evaluate")
        print("\nBy a named protocol (scd protocols), of which each setting is a flag:\n")
        _evaluate_by_protocol(["--help"], "toy-8-8")
    config = _parse(EvaluateConfig, _run_first(words), "evaluate")
    print(readable(evaluate(config)))
    print(f"saved {config.out}")


def _evaluate_by_protocol(words: list[str], name: str) -> None:
    chosen = protocol(name)
    default = ProtocolConfig(protocol=chosen)
    config = _parse(ProtocolConfig, _run_first(words), f"evaluate --protocol {name}", default)
    result = evaluate_by_protocol(config)
    if result is not None:
        print(readable_by_protocol(result))
        print(f"saved {config.out}")


def _value_of(words: list[str], flag: str) -> str | None:
    """Return what follows a flag, or what stands behind its "="; None: the flag is not there."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return following if word == flag else word.partition("=")[2]
    return None


def _protocols(words: list[str]) -> None:
    if any(word in ("-h", "--help") for word in words):
        print("usage: scd protocols\n\nLists the protocols of scd evaluate --protocol NAME.")
        return
    if words:
        raise ValueError(f"scd protocols takes nothing else, got {' '.join(words)}")
    print(listing())


def _play(words: list[str]) -> None:
    play(_parse(PlayConfig, _run_first(words), "play"))


def _train_autoencoder(words: list[str]) -> None:
    config = _parse(TrainAutoencoderConfig, words, "train-autoencoder")
    print(readable_reconstruction(train_autoencoder(config)))
    print(f"saved {config.out}")


def _train_judge(words: list[str]) -> None:
    config = _parse(TrainJudgeConfig, words, "train-judge")
    print(readable_judge(train_judge(config).held_out))
    print(f"saved {config.out}")


def _probe(words: list[str]) -> None:
    probe(_parse(ProbeConfig, _run_first(words), "probe"))


def _serve(words: list[str]) -> None:
    config = _parse(ServeConfig, _run_first(words), "serve")
    serve(config) if config.replicas is None else serve_replicas(config)


def _run_first(words: list[str]) -> list[str]:
    """Let the run stand first, without its flag."""
    if words and not words[0].startswith("-"):
        return ["--run", *words]
    return words


def _convert(words: list[str]) -> None:
    name, rest = _split_name(words, "convert", "layout", ["reference", "autoencoder", "wan"])
    if name == "autoencoder":
        rest = ["--file", *rest] if rest and not rest[0].startswith("-") else rest
        chosen = _parse(ConvertAutoencoderConfig, rest, "convert autoencoder")
        Console().print(f"saved {convert_autoencoder(chosen)}")
        return
    if name == "wan":
        Console().print(f"saved {convert_wan(_parse(ConvertWanConfig, rest, 'convert wan'))}")
        return
    paths = [word for word in rest[:2] if not word.startswith("-")]
    if len(paths) < 2:
        if not any(word in ("-h", "--help") for word in rest):
            raise ValueError("scd convert reference needs a state dict and a folder to write")
        print("usage: scd convert reference STATE_DICT OUT ...")
        print("   or: scd convert autoencoder STATE_DICT --out DIR ...; try --help after it")
        print("   or: scd convert wan --model MODEL --out DIR ...; try --help after it\n")
        paths = ["", ""]
    else:
        rest = rest[2:]
    config = _parse(ReferenceConfig, rest, "convert reference STATE_DICT OUT")
    Console().print(f"saved {convert_reference(paths[0], paths[1], config)}")


def _export(words: list[str]) -> None:
    name, rest = _split_name(words, "export", "format", ["diffusers"])
    if name is None:
        print("usage: scd export diffusers RUN --out DIR")
        return
    config = _parse(ExportConfig, _run_first(rest), "export diffusers")
    for folder in export_diffusers(config.run, config.out):
        Console().print(f"saved {folder}")


def _bench(words: list[str]) -> None:
    if words[:1] == ["compare"]:
        compare(_parse(CompareConfig, words[1:], "bench compare"))
        return
    if words and not words[0].startswith("-"):
        raise ValueError(f"scd bench takes flags, or compare first; got {words[0]!r}")
    bench(_parse(BenchConfig, words, "bench"))


def _intervene(words: list[str]) -> None:
    kinds = {"skip": SkipConfig, "diagonal": DiagonalConfig, "recompose": RecomposeConfig}
    name, rest = _split_name(words, "intervene", "kind", list(kinds))
    if name is None:
        print(f"usage: scd intervene {{{','.join(kinds)}}} RUN --out DIR ...")
        print("try scd intervene skip --help")
        return
    config = _parse(kinds[name], _run_first(rest), f"intervene {name}")
    print(markdown(intervene(config)))
    print(f"saved {config.comparison.out}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
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
    "probe": _probe,
    "bench": _bench,
    "intervene": _intervene,
    "convert": _convert,
    "export": _export,
}
"""Subcommands by name."""
