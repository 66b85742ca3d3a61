"""What a launcher's environment asks for is obeyed or refused, in one sentence."""

import logging
import os
import warnings

import pytest

from scd.cli import COMMANDS, SHARED, main
from scd.common import launcher
from scd.common.launcher import check_device, check_launch, num_started, rank
from scd.common.processes import Processes, started_device
from scd.common.runlog import read_log

TINY = (
    "train toy --max-steps 2 --num-frames 3 --batch-size 1 --validate-every 0 --log-every 1 "
    "--sample-every 0 --num-validation-clips 1 --model.block.width 64 --precision fp32"
).split()
"""A run of two small steps, on whatever device is chosen."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, whatever the tests were started by."""
    for name in (*launcher.COUNTS, *launcher.RANKS, "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name in [one for one in os.environ if one.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)


def setenv(monkeypatch, line: str) -> None:
    for pair in line.split():
        monkeypatch.setenv(*pair.split("="))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "STEPS is 4, but a step has 1 micro-batches"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=auto", "STEPS is auto"),
        ("ACCELERATE_MIXED_PRECISION=bf16", "asks for bf16, but the command has fp32"),
        ("ACCELERATE_MIXED_PRECISION=fp16", "asks for fp16, but there are fp32 and bf16"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "is INDUCTOR, but the network is not compiled"),
        ("ACCELERATE_GRADIENT_CLIPPING=0.5", "is 0.5, but gradients are clipped by --optim"),
        ("ACCELERATE_USE_DEEPSPEED=true", "asks for DeepSpeed, which there is not here"),
        ("ACCELERATE_USE_MEGATRON_LM=true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "asks for accelerate's parallelism_config"),
        (
            "ACCELERATE_USE_SAGEMAKER=true ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE=DATA_PARALLEL",
            "Sage",
        ),
        ("ACCELERATE_USE_FSDP=true", "by FSDP2 only: needed fsdp_version 2"),
        ("ACCELERATE_USE_FSDP=true FSDP_VERSION=2", "among several processes, and one was"),
        ("ACCELERATE_USE_FSDP=true FSDP_OFFLOAD_PARAMS=true", "asks for weights in the CPU's"),
        (
            "ACCELERATE_USE_FSDP=true FSDP_RESHARD_AFTER_FORWARD=false",
            "stay whole after the forward",
        ),
        ("ACCELERATE_USE_FSDP=true FSDP_ACTIVATION_CHECKPOINTING=true", "--gradient-checkpointing"),
        ("ACCELERATE_TORCH_DEVICE=xpu", "ACCELERATE_TORCH_DEVICE is xpu, but the command runs on"),
        ("ACCELERATE_MIXED_PRECISION=no MASTER_ADDR=127.0.0.1", "use torchrun --nproc-per-node"),
        ("WORLD_SIZE=2", "no RANK says which this one is: start them by torchrun"),
        (
            "WORLD_SIZE=two",
            "WORLD_SIZE must be a number in the environment, got 'two'",
        ),
    ],
)
def test_what_a_run_would_not_do_is_refused_by_the_run_and_its_plan(
    line, message, tmp_path, monkeypatch, capsys
):
    setenv(monkeypatch, line)
    for words in ([*TINY, "--out", str(tmp_path / "run")], [*TINY, "--dry-run"]):
        assert main(words) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def gradients(tmp_path, name: str, *words: str) -> list[float]:
    assert main([*TINY, *words, "--device", "cpu", "--out", str(tmp_path / name)]) == 0
    return [event["grad_norm"] for event in read_log(tmp_path / name, "step")]


def test_accumulation_that_accelerate_is_told_too_divides_gradients_once(tmp_path, monkeypatch):
    alone = gradients(tmp_path, "alone", "--num-accumulation", "2")
    # As `accelerate launch` writes them, where nobody chose but the first.
    setenv(
        monkeypatch,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 ACCELERATE_MIXED_PRECISION=no "
        "ACCELERATE_DYNAMO_BACKEND=NO ACCELERATE_DYNAMO_MODE=default ACCELERATE_USE_CPU=False",
    )
    assert gradients(tmp_path, "told", "--num-accumulation", "2") == alone


def test_precision_that_accelerate_is_told_too_is_the_runs(monkeypatch):
    setenv(monkeypatch, "ACCELERATE_MIXED_PRECISION=bf16")
    check_launch("bf16")
    with pytest.raises(ValueError, match="accelerate launch --mixed_precision no"):
        Processes("cpu")


def test_accelerates_cpu_is_the_automatic_device(monkeypatch):
    setenv(monkeypatch, "ACCELERATE_USE_CPU=True")
    assert started_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--cpu, but the command cuda: give --device cpu"):
        check_device("cuda")


def test_every_command_shares_its_work_or_refuses_several_processes(monkeypatch, capsys):
    setenv(monkeypatch, "WORLD_SIZE=2 RANK=0")
    assert (num_started(), rank()) == (2, 0)
    for command in COMMANDS.keys() - set(SHARED):
        assert main([command]) == 2
        assert f"scd {command} runs in one process, and 2 were started" in capsys.readouterr().err


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setattr("scd.cli.FIRST_SPEAKS_S", 0.0)
    setenv(monkeypatch, "WORLD_SIZE=2 RANK=1")
    assert main(["protocols"]) == 2
    assert main(["train", "toy", "--dry-run"]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["train", "toy", "--max-steps", "many"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("scd: ") == 1
    assert printed.err.startswith("scd: process 1: scd protocols runs in one process")


def test_what_is_logged_and_warned_of_is_as_before_after_a_silent_process(monkeypatch):
    setenv(monkeypatch, "WORLD_SIZE=2 RANK=1")
    logger = logging.getLogger("scd")
    before = logger.level, list(warnings.filters)
    with launcher.first_speaks():
        assert not logger.isEnabledFor(logging.WARNING)
    assert (logger.level, warnings.filters) == before


def test_processes_of_mpirun_are_known(monkeypatch):
    setenv(monkeypatch, "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3")
    assert (num_started(), rank()) == (4, 3)


def test_a_share_is_that_of_the_launcher_or_of_the_flag():
    processes = Processes("cpu")
    assert processes.share("0/1") == (0, 1) and processes.share("2/5") == (2, 5)
    assert processes.gather("mine") == ["mine"]
