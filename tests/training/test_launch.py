"""Commands started by torchrun and accelerate as the documents print them: no device is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scd.cli import main
from scd.common.runlog import read_log
from scd.models.checkpoint import load_world
from tests.common.test_launcher import TINY

TORCHRUN = ("torchrun", "--nproc-per-node", "2")
MODULE = ("-m", "scd")
PROGRAM = ("--no-python", "scd")
ACCELERATE = ("accelerate", "launch")


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that is installed beside this Python, on a machine without GPUs."""
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    # Another test may start processes at the same time.
    if words[0] == "torchrun":
        words = (words[0], "--standalone", *words[1:])
    return subprocess.run(
        words,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_of_torchrun_share_a_training(tmp_path):
    run = tmp_path / "run"
    done = start(*TORCHRUN, *MODULE, *TINY, "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved {run}\n"
    (begun,) = read_log(run, "start")
    assert begun["num_processes"] == 2 and begun["device"].startswith("cpu")
    assert done.stderr.count("   machine") == 0 and done.stderr.count("start  step 0") == 1
    assert [event["step"] for event in read_log(run, "step")] == [1, 2]
    # Half the clips in each: the gradient is not that of one process.
    assert main([*TINY, "--out", str(tmp_path / "one")]) == 0
    alone, shared = (
        [event["grad_norm"] for event in read_log(folder, "step")]
        for folder in (tmp_path / "one", run)
    )
    assert alone[0] != shared[0]


@pytest.mark.slow
def test_the_program_is_the_module_and_bad_input_is_told_once(tmp_path):
    lost = str(tmp_path / "nowhere")
    for command in (MODULE, PROGRAM):
        done = start(*TORCHRUN, *command, *TINY, "--out", str(tmp_path / "run"), "--data", lost)
        assert done.returncode != 0
        told = [line for line in done.stderr.splitlines() if line.startswith("scd: ")]
        assert len(told) == 1 and "nowhere" in told[0], done.stderr
        assert "exitcode  : 2" in done.stderr
        assert "Traceback" not in done.stderr.partition("scd: ")[0]
    cut = ("--optim.optimizer", "adamw", "--shard-weights", "--dry-run")
    planned = start(*TORCHRUN, *PROGRAM, *TINY, *cut)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["num_processes"] == 2


@pytest.mark.slow
def test_two_processes_cut_weights_up_as_their_plan_says(tmp_path):
    run = tmp_path / "run"
    words = (*TINY, "--optim.optimizer", "adamw", "--out", str(run))
    done = start(*TORCHRUN, *MODULE, *words, "--shard-weights")
    assert done.returncode == 0, done.stderr
    assert read_log(run, "start")[0]["sharded"] is True
    assert load_world(run).model is not None


@pytest.mark.slow
def test_fsdp2_that_accelerate_is_configured_for_holds_on_cpus(tmp_path):
    config = tmp_path / "fsdp.yaml"
    lines = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "use_cpu": "true",
        "num_processes": "2",
        "num_machines": "1",
        "main_process_port": "0",
        "mixed_precision": "'no'",
        "fsdp_config": "{fsdp_version: 2}",
    }
    config.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    words = (*TINY, "--optim.optimizer", "adamw", "--out")
    begin = (*ACCELERATE, "--config_file", str(config))
    done = start(*begin, *MODULE, *words, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    (begun,) = read_log(tmp_path / "run", "start")
    assert begun["num_processes"] == 2 and begun["sharded"] is True
    muon = start(*begin, *MODULE, *TINY, "--out", str(tmp_path / "muon"))
    assert muon.returncode != 0 and "muon looks at whole matrices" in muon.stderr


@pytest.mark.slow
def test_accelerate_that_starts_one_of_two_processes_on_cpus_is_told(tmp_path):
    begin = (*ACCELERATE, "--cpu", "--num_processes")
    words = (*MODULE, *TINY, "--out", str(tmp_path / "run"))
    lost = start(*begin, "2", *words)
    assert lost.returncode != 0 and lost.stderr.count("scd: ") == 1
    assert "use torchrun --nproc-per-node N -m scd" in lost.stderr
    assert not (tmp_path / "run").exists()
    one = start(*begin, "1", *words)
    assert one.returncode == 0, one.stderr
    assert read_log(tmp_path / "run", "start")[0]["num_processes"] == 1


@pytest.mark.slow
def test_two_processes_encode_what_one_does(tmp_path):
    clips = tmp_path / "clips"
    record = f"record toy --out {clips} --size 32 --episodes 6 --frames 8"
    assert main(record.split()) == 0
    made = {}
    for name, launcher in (("one", ("python",)), ("two", TORCHRUN)):
        out = tmp_path / name
        words = f"encode {clips} --autoencoder pixels --episodes-per-file 1 --out {out}".split()
        done = start(*launcher, *MODULE, *words)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if "files written" in line]
        made[name] = (
            line.partition(":")[2].split(",")[0],
            sorted(
                (path.relative_to(out), path.read_bytes()) for path in out.rglob("*.safetensors")
            ),
        )
    assert made["one"] == made["two"] and made["one"][1]
