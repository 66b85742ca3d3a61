"""The contract of the command line: exit statuses, and one message on stderr."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import scd
from scd import cli
from scd.cli import COMMANDS, main
from scd.common.signals import Interrupted
from scd.completion import settings_of_commands
from scd.training import fit


def run(arguments: list[str]) -> int:
    """Return the exit status as a shell sees it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@pytest.fixture(autouse=True)
def measure_little(monkeypatch):
    monkeypatch.setattr(fit, "NUM_MEASURED_BATCHES", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dance", "unknown command 'dance'; there are demo, "),
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train doom-46", "unknown preset 'doom-46'; did you mean 'doom-64'?"),
        ("evaluate . --protocol toy-8-9", "unknown protocol 'toy-8-9'; did you mean 'toy-8-8'?"),
        ("--print-completion bsh", "unknown shell 'bsh'; did you mean 'bash'?"),
        ("--print-completion", "takes one shell: bash, zsh, fish"),
        ("train nothing", "unknown preset 'nothing'; there are toy"),
        ("train", "needs a preset first: toy"),
        ("train toy --data {folder}/nowhere", "nowhere: no such data folder"),
        ("train scd-b --data {folder}/nowhere", "nowhere: no such data folder"),
        ("train toy --max-steps many", "many"),
        ("train toy --max-steps 0", "max_steps must be 1 or more, got 0"),
        ("train toy --optim.lr nan", "lr must be above 0 and 10000 at most, got nan"),
        ("train toy --no-such-flag 1", "no-such-flag"),
        ("train toy --model.shape.height 64", "model.shape.height is 64, but toy:32 says 32"),
        ("train toy --num-frames 8 --model.cache.window 12", "window is 12, but num_frames is 8"),
        ("train toy --out {folder}/other", "not the folder of a run"),
        ("sample {folder}/nowhere --data toy:32", "nowhere"),
        ("evaluate {folder}/nowhere --data toy:32 --out {folder}/a.json", "nowhere"),
        ("record cinema", "unknown world 'cinema'; there are doom, gym, toy"),
        ("convert reference", "needs a state dict"),
        ("convert reference {folder}/nowhere.pt {folder}/made", "nowhere.pt"),
        ("bench --threads 0", "threads must be auto, or 1 or more, got 0"),
        ("probe {folder}/run --data toy:32 --threads 0", "threads must be auto, or 1 or more"),
        (
            "intervene skip {folder}/run --layers 1 --full-steps 1 --out {folder}/out --threads 0",
            "threads must be auto, or 1",
        ),
        ("vbench {folder}/run --prompts p --out {folder}/out --threads 0", "threads must be auto"),
    ],
)
def test_wrong_usage_and_bad_input_are_2_and_one_message(line, message, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").touch()
    words = line.format(folder=tmp_path).split()
    if words[0] in ("train", "sample", "evaluate") and "--out" not in words and len(words) > 1:
        words += ["--out", str(tmp_path / "out")]
    assert run(words) == 2
    errors = capsys.readouterr().err
    assert message in errors.replace("\n", " ") and "Traceback" not in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_no_command_is_wrong_usage(capsys):
    assert run([]) == 2 and run(["--help"]) == 0 and run(["--version"]) == 0
    printed = capsys.readouterr()
    assert f"scd {scd.__version__}\n" in printed.out and not printed.err
    assert run(["sample", "--help"]) == 0


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("a fault of ours"), 1, "Traceback"),
        (AssertionError(), 1, "Traceback"),
        (torch.OutOfMemoryError("tried 3 GiB\ntable"), 1, "scd: the memory of the GPU is full"),
        (KeyboardInterrupt(), 130, "scd: interrupted\n"),
        (Interrupted("SIGINT", "saved"), 130, "scd: saved\n"),
        (Interrupted("SIGTERM", "saved"), 143, "scd: saved\n"),
        (OSError("the disk is full"), 2, "scd: the disk is full\n"),
    ],
    ids=repr,
)
def test_how_a_command_ended_is_the_exit_status(error, status, message, capsys, monkeypatch):
    def end(words: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "demo", end)
    assert run(["demo"]) == status
    errors = capsys.readouterr().err
    assert errors.startswith(message)
    assert message == "Traceback" or ("Traceback" not in errors and errors.count("\n") == 1)


@pytest.mark.parametrize("preset", ["scd-b", "doom-64"])
def test_a_dry_run_needs_no_data(preset, tmp_path, capsys):
    small = f"--batch-size 1 --num-frames 3 --data {tmp_path}/nowhere --dry-run"
    assert run(["train", preset, *small.split()]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["plan"]["total_parameters"] > 1e6
    assert report["config"]["model"]["cache"]["window"] == 3
    assert printed.err.startswith("scd: warning: ") and "nowhere" in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_processes_that_started_it(tmp_path, capsys, monkeypatch):
    words = f"train scd-b --num-frames 3 --data {tmp_path}/nowhere --dry-run".split()
    monkeypatch.setenv("RANK", "0")
    weights = []
    for number, more in (("1", []), ("4", ["--shard-weights"])):
        monkeypatch.setenv("WORLD_SIZE", number)
        assert run([*words, *more]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_processes"] == int(number)
        weights.append(report["plan"]["memory"]["weights_gib"])
    assert weights[0] == pytest.approx(4 * weights[1])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run([*words, "--shard-weights"]) == 2
    assert "several processes, and one was started" in capsys.readouterr().err


def test_the_help_of_convert_names_all_that_it_converts(capsys):
    assert run(["convert", "--help"]) == 0
    shown = capsys.readouterr().out
    for line in ("convert reference STATE_DICT OUT", "convert autoencoder STATE_DICT --out DIR"):
        assert line in shown
    assert "convert wan --model MODEL --out DIR" in shown


def test_a_dry_run_is_a_flag_of_the_help(capsys):
    assert run(["train", "toy", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_dry_run_still_refuses_settings_that_contradict_each_other(tmp_path, capsys):
    line = f"train doom-64 --data {tmp_path}/nowhere --num-frames 8 --model.cache.window 12"
    assert run([*line.split(), "--dry-run"]) == 2
    assert "window is 12" in capsys.readouterr().err


def test_help_of_a_command_is_its_help(capsys):
    for command in ("sample", "data check", "train toy", "bench compare"):
        assert run([*command.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert run(["help", *command.split()]) == 0
        assert capsys.readouterr().out == shown and "--" in shown
    assert run(["help"]) == 0 and capsys.readouterr().out.startswith("usage: scd COMMAND")
    assert run(["help", "trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert run(["hlep"]) == 2
    assert "did you mean 'help'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((name, f"scd {name} needs a RUN first") for name in ("evaluate", "probe", "vbench")),
        ("sample", "scd sample needs a RUN first: the folder of a run or of a world; scd help "),
        ("export diffusers", "scd export diffusers needs a RUN first"),
        ("export onnx", "scd export onnx needs a RUN first"),
        ("export web", "scd export web needs a RUN first"),
        ("intervene skip", "scd intervene skip needs a RUN first"),
        ("evaluate run", "scd evaluate needs --data, the clips to measure on"),
        ("evaluate --data toy:32", "scd evaluate needs a RUN first"),
        ("probe run", "--data"),
        ("vbench run", "--prompts"),
        ("distill", "World, run or step folder to learn from"),
        ("train-autoencoder", "--data"),
        ("train-judge", "--data"),
        ("data check", "The folder, or KIND:PATH"),
        ("data", "scd data needs a action first: check"),
        ("encode", "--data"),
        ("record", "needs a world first: doom, gym, toy"),
        ("convert", "needs a layout first"),
        ("convert wan", "--model"),
        ("export", "needs a format first"),
        ("intervene", "needs a kind first"),
        ("train", "needs a preset first"),
    ],
)
def test_a_command_says_what_is_missing(line, message, capsys):
    assert run(line.split()) == 2
    errors = capsys.readouterr().err
    assert message.lower() in errors.replace("\n", " ").lower()
    assert "Traceback" not in errors and "zip" not in errors


@pytest.mark.parametrize(
    "line",
    [
        "serve --host 127.0.0.1 --port 0 {name}",
        "play --no-browser --port 0 {name}",
        "sample --context 4 {name} --frames 2",
        "sample --out x {name}",
        "sample --seed 3 --prompt birds {name}",
        "evaluate --data toy:32 {name} --num-clips 4",
        "probe --data {name} {name}",
        "probe --data=toy:32 --num-clips 4 {name}",
        "vbench --prompts x --out y {name}",
        "encode --autoencoder pixels {name} --out y",
        "distill --max-steps 3 --steps 2 {name}",
        "distill wan-dmd --max-steps 3 --prompts x --teacher y {name}",
        "distill wan-consistency --max-steps 3 --data x --steps 1000 500 {name}",
        "intervene skip --layers 1-2 --full-steps 1 --out y {name}",
        "export diffusers --out y {name}",
        "export onnx --out y --weights fp16 {name}",
        "convert autoencoder --out y {name}",
        "data check --num-frames 3 {name}",
        "train --max-steps 3 {name}",
    ],
)
def test_what_needs_no_flag_may_stand_after_flags(line, tmp_path, monkeypatch, capsys):
    """It is found there: the message is about what lies, or does not lie, under the name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("birds\n")
    assert run(line.format(name="nowhere-at-all").split()) == 2
    errors = capsys.readouterr().err
    assert "nowhere-at-all" in errors and "needs a" not in errors and "nrecognized" not in errors


def test_a_preset_may_stand_after_flags(capsys):
    assert run("train --max-steps 3 --dry-run toy --batch-size 2".split()) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["max_steps"], config["batch_size"]) == (3, 2)
    # A flag that there is not is named, whatever stands beside it.
    assert run("serve --hots 3 doom".split()) == 2
    assert "--hots" in capsys.readouterr().err
    assert run("sample --context 4 doom --num-frames 2".split()) == 2
    assert "--num-frames" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["play", "dom"], ["sample", "dom"]])
def test_the_nearest_world_is_suggested(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "doom-fine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run([words[0], "doom-fin"]) == 2
    assert "did you mean 'doom-fine'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["--help", "protocols", "train toy --help", "--print-completion bash"]
)
def test_a_reader_that_leaves_ends_a_command_quietly(line):
    command = [sys.executable, "-m", "scd", *line.split()]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    def end(words: list[str]) -> None:
        raise BrokenPipeError("the worker is gone")

    monkeypatch.setitem(COMMANDS, "demo", end)
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == "scd: the worker is gone\n"


def test_every_command_is_in_the_usage():
    assert all(f"\n  {name} " in cli.USAGE for name in COMMANDS)


@pytest.mark.parametrize("line", ["--help", "--version", "trian", ""])
def test_help_and_wrong_usage_answer_without_torch(line):
    code = (
        "import sys; from scd.cli import main; main(sys.argv[1:]); "
        "sys.exit(3 if 'torch' in sys.modules or 'tyro' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code, *line.split()]).returncode == 0


def test_help_of_settings_and_wrong_presets_answer_without_torch():
    lines = (
        "train --help,train toy --help,train dom,train toy --stepz 3,train-autoencoder --help,"
        "train-judge --help,distill --help,distill wan-dmd --help,sample --help,vbench --help,"
        "distill wan-consistency --help,"
        "evaluate --help,evaluate --protocol toy-9-9,protocols,play --help,serve --help,"
        "demo --help,bench --help,bench compare --help,probe --help,intervene skip --help,"
        "intervene recompose --help,convert --help,convert reference --help,convert wan --help,"
        "convert autoencoder --help,export diffusers --help,data check --help,encode --help"
    )
    code = """
import sys
from contextlib import suppress
from scd.cli import main
for line in sys.argv[1].split(","):
    with suppress(SystemExit):
        main(line.split())
    if heavy := {"torch", "numpy", "pydantic", "matplotlib", "av"} & set(sys.modules):
        sys.exit(f"{line} loads {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", code, lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'doom-64'" in done.stderr


def test_completion_knows_every_command():
    assert set(settings_of_commands()) == set(COMMANDS)


def completion_of(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "scd", "--print-completion", shell],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "bash"
    path.write_text(completion_of("bash"))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train", "train-autoencoder", "train-judge"]),
        (["train", "doom-1"], ["doom-128", "doom-128-dense"]),
        (["train", "toy", "--batch-s"], ["--batch-size"]),
        (["train", "toy", "--dry"], ["--dry-run"]),
        (["train", "scd-m", "--model.enc"], None),
        (["intervene", "sk"], ["skip"]),
        (["distill", "wan"], ["wan-consistency", "wan-dmd"]),
        (["distill", "wan-dmd", "--emb"], ["--embedded"]),
        (["distill", "--meth"], ["--method"]),
    ],
    ids=str,
)
def test_bash_completes(words, expected, bash_completion):
    script = (
        f"source {bash_completion}; COMP_WORDS=(scd {' '.join(words)}); "
        f"COMP_CWORD={len(words)}; _tyro_scd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    found = sorted(done.stdout.splitlines())
    assert len({word[:2] for word in found}) == 1, "further lines of a help text"
    assert found == expected or (expected is None and "--model.encoder.num-layers" in found)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / shell).write_text(completion_of(shell))
    subprocess.run([shell, "-n", tmp_path / shell], check=True)
