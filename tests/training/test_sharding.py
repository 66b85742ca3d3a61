"""Two processes that share the weights train as one that has them all; what they save is whole."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scd.cli import main
from scd.common.config import from_json
from scd.common.runlog import read_log
from scd.common.runtime import make_generator
from scd.models.checkpoint import load_optimizers, load_world
from scd.models.config import SamplingConfig
from scd.objectives.config import ConsistencyConfig
from scd.optim.config import OptimConfig
from scd.optim.optim import EMA, build_optimizers, lr_multiplier, parameter_groups, set_lr
from scd.training.config import TrainConfig
from scd.training.fit import load_initial, open_loader
from scd.training.sharding import is_sharded
from scd.training.world import build_model
from tests.tiny import teacher_forced_loss
from tests.tiny_wan_run import encode_with, words_of, write_clips, write_world

TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scd")


def train_together(words: list[str]) -> None:
    """Run a command in two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *TOGETHER, *words], env=environment, capture_output=True, timeout=500
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def train_plainly(config: TrainConfig) -> tuple[dict, dict]:
    """The weights and their average after a run of two processes, computed in one, by a loop of
    its own: the mean of what both would have as gradients."""
    loaders = [open_loader(config, rank, 2) for rank in range(2)]
    model = build_model(config)
    load_initial(model, config)
    ema = EMA(model, config.ema_decay)
    groups = parameter_groups(model, model.encoder_parameters(), config.optim)
    optimizers = build_optimizers(groups, config.optim)
    for step in range(config.max_steps):
        set_lr(optimizers, lr_multiplier(config.optim, step, config.max_steps))
        for micro in range(config.num_accumulation):
            for rank in range(2):
                batch = loaders[rank].batch(step * config.num_accumulation + micro)
                generator = make_generator(config.seed, "train", rank, step, micro)
                loss, _ = teacher_forced_loss(
                    model, batch.frames, batch.conditions, config.objective, generator
                )
                (loss / (2 * config.num_accumulation)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
    return model.state_dict(), ema.state_dict()


@pytest.mark.slow
def test_weights_cut_up_among_two_processes_train_as_one_would(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, world = write_world(tmp_path)
    latents = encode_with(world, write_clips(tmp_path / "clips"), tmp_path / "latents")
    changes = ["--batch-size", "1", "--num-accumulation", "2", "--gradient-checkpointing"]
    changes += ["--num-validation-clips", "3", "--shard-weights"]
    looks = ["--validate-every", "2", "--sample-every", "4"]
    run = tmp_path / "run"
    words = words_of(latents, world, run, *changes)
    # In two parts: what was saved is cut up again.
    train_together([*words, "--max-steps", "2"])
    train_together([*words, *looks])
    assert read_log(run, "start")[0]["sharded"] is True
    assert (run / "samples/step_000004.png").exists()
    config = from_json(TrainConfig, json.loads((run / "config.json").read_text()), "config")
    weights, averaged = train_plainly(config)
    saved = load_file(run / "step_000004/raw.safetensors")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5, msg=name)
    for name, weight in load_world(run).model.state_dict().items():
        torch.testing.assert_close(weight, averaged[name], rtol=0, atol=1e-5, msg=name)
    # One process goes on from it, and measures what two have measured together.
    (states,) = load_optimizers(run / "step_000004")
    assert all(type(part) is torch.Tensor for s in states["state"].values() for part in s.values())
    alone = [word for word in words if word != "--shard-weights"]
    assert main([*alone, "--max-steps", "5", "--validate-every", "5"]) == 0
    assert read_log(run, "resume")[-1]["num_processes_before"] == 2
    losses = [event["loss"] for event in read_log(run, "validation")]
    assert len(losses) == 2 and abs(losses[1] / losses[0] - 1) < 0.01


def test_what_cannot_be_cut_up_is_refused():
    config = TrainConfig(shard_weights=True)
    whole = replace(config, shard_weights=False)
    assert is_sharded(config, 2) and is_sharded(whole, 2, fsdp_version=2)
    assert not is_sharded(whole, 2) and not is_sharded(whole, 1)
    muon, small = OptimConfig(optimizer="muon"), OptimConfig(state="offload")
    student = replace(config, objective=ConsistencyConfig(), sampling=SamplingConfig())
    for changed, version, message in (
        (config, 1, "needed fsdp_version 2"),
        (replace(config, optim=muon), 0, "muon looks at whole matrices"),
        (replace(config, optim=small), 0, "optim.state fp32; got adamw and offload"),
        (student, 0, "not for distillation: got ConsistencyConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            is_sharded(changed, 2, version)
    with pytest.raises(ValueError, match="several processes, and one was started"):
        is_sharded(config, 1)


def test_large_weights_lie_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("scd.models.checkpoint.SHARD_BYTES", 200_000)
    out = Path(tmp_path / "run")
    words = ["train", "toy", "--out", str(out), "--max-steps", "1", "--num-frames", "3"]
    words += ["--batch-size", "1", "--validate-every", "0", "--sample-every", "0"]
    words += ["--device", "cpu", "--model.block.width", "64"]
    assert main(words) == 0
    names = {path.name for path in (out / "step_000001").iterdir()}
    assert {"model.safetensors.index.json", "raw.safetensors.index.json"} <= names
    assert main([*words, "--max-steps", "2"]) == 0
    assert read_log(out, "resume")[0]["step"] == 1
    assert load_world(out, weights="raw").model is not None
