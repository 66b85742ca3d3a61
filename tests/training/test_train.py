"""The training loop on the toy world: it learns, resumes bit for bit, and stops cleanly."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from scd.autoencoders.build import latents_of
from scd.common.config import differences
from scd.common.files import TEMPORARY, take_lock
from scd.common.provenance import command
from scd.common.runlog import read_log
from scd.common.runtime import cpu_threads, derive_seed
from scd.common.signals import Interrupted
from scd.data.loader import Loader
from scd.data.manifest import read_manifest, write_manifest
from scd.data.source import open_source
from scd.models.checkpoint import load_world
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.progress import load_progress
from scd.objectives.config import DenoiseConfig
from scd.objectives.denoise import validation_loss
from scd.optim.config import OptimConfig
from scd.training.config import TrainConfig
from scd.training.held_out import of_other_clips, validate
from scd.training.world import build_model, clip_objective, train
from tests.tiny import objective_of, shaken

SMALL = BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6), initial_gate=0.5)
CONDITIONS = open_source("toy:32", "train").card.conditions
SEPARABLE = SeparableConfig(
    block=SMALL,
    encoder=EncoderConfig(num_layers=1),
    decoder=DecoderConfig(num_layers=1),
    conditions=CONDITIONS,
    cache=CacheConfig(window=4),
)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        max_steps=4,
        num_frames=4,
        batch_size=2,
        log_every=1,
        validate_every=0,
        sample_every=0,
        save_every=0,
        num_validation_clips=3,
        device="cpu",
        model=SEPARABLE,
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        sampling=SamplingConfig(num_steps=1),
    )


def files_of(run) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    folder = run / (run / "last").read_text().strip()
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    progress = json.loads(files.pop("progress.json"))
    progress.pop("elapsed_s")
    return files | {"progress": json.dumps(progress).encode()}


@pytest.mark.parametrize(
    "change",
    [
        {"validate_every": 2, "sample_every": 3},
        {
            "optim": OptimConfig(optimizer="muon", warmup_steps=2, decay_fraction=0.5),
            "num_accumulation": 2,
            "gradient_checkpointing": True,
            "precision": "bf16",
        },
        {
            "model": DenseConfig(
                block=SMALL, num_layers=1, conditions=CONDITIONS, cache=CacheConfig(window=4)
            ),
            "objective": DenoiseConfig(context_noise=0.0),
        },
    ],
    ids=["separable", "muon-accumulation-checkpointing-bf16", "dense"],
)
def test_two_and_two_steps_are_four_steps_bit_for_bit(config, tmp_path, change):
    config = replace(config, save_every=2, **change)
    whole = train(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    train_steps(parts, 2)
    assert load_progress(tmp_path / "parts" / "step_000002").step == 2
    train(parts)
    assert files_of(tmp_path / "parts") == files_of(whole)
    losses = [event["loss"] for event in read_log(whole, "step")]
    assert [event["loss"] for event in read_log(tmp_path / "parts", "step")] == losses
    assert len(losses) == 4 and len(set(losses)) == 4


@pytest.fixture
def four_threads():
    """As on a machine of four cores."""
    with cpu_threads(4):
        yield


def wide(config: TrainConfig) -> TrainConfig:
    """A run whose products are large enough for threads to share them."""
    block = BlockConfig(width=128, head_dim=32, rotary_axes=(8, 12, 12), initial_gate=0.5)
    return replace(config, model=replace(SEPARABLE, block=block), batch_size=4)


def test_a_number_of_threads_changes_rounding_only_and_resumes_bit_for_bit(
    config, tmp_path, four_threads
):
    config = replace(wide(config), save_every=2, threads=2)
    whole = train(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    train_steps(parts, 2)
    train(parts)
    assert files_of(tmp_path / "parts") == files_of(whole)
    one = train(replace(config, threads=1, out=str(tmp_path / "one")))
    two, one = ([event["loss"] for event in read_log(run, "step")] for run in (whole, one))
    assert one == pytest.approx(two, rel=1e-4)
    assert torch.get_num_threads() == 4


def test_threads_are_chosen_in_the_first_steps_and_a_continued_run_keeps_them(
    config, tmp_path, four_threads, monkeypatch
):
    # Whatever else the machine does: no number is given up unmeasured, or passed over.
    monkeypatch.setattr("scd.common.threads.CROWDED", math.inf)
    monkeypatch.setattr("scd.common.threads.LONG_S", math.inf)
    config = replace(wide(config), max_steps=40)
    run = train(config)
    (choice, *_) = read_log(run, "threads")
    seconds = {int(number): value for number, value in choice["step_s"].items()}
    assert set(seconds) >= {1, 2} and min(seconds.values()) > 0
    assert seconds[choice["chosen"]] <= 1.1 * min(seconds.values())
    steps = read_log(run, "step")
    assert {event["threads"] for event in steps} >= {1, 2}
    assert all(event["processor_s"] > 0 for event in steps)
    progress = load_progress(run / "step_000040")
    assert progress.num_threads == read_log(run, "threads")[-1]["chosen"]
    train(replace(config, max_steps=42))
    resumed = [event["threads"] for event in read_log(run, "step") if event["step"] > 40]
    assert resumed == [progress.num_threads] * 2
    pinned = train(replace(config, max_steps=4, threads=1, out=str(tmp_path / "pinned")))
    losses = [[event["loss"] for event in read_log(one, "step")][:4] for one in (run, pinned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not read_log(pinned, "threads") and torch.get_num_threads() == 4


def test_validation_tells_whether_the_model_listens(config):
    deaf = train(replace(config, validate_every=2))
    assert all(abs(event["action_gap"]) < 0.05 for event in read_log(deaf, "validation"))
    run = load_world(deaf)
    batches = [
        Loader(open_source("toy:32", "val"), size, 4, seed=0).batch(index)
        for index, size in ((0, 2), (1, 1))
    ]
    first, second = of_other_clips([batch.conditions for batch in batches])
    given, moved = (
        torch.cat([one.actions for one in conditions if one.actions is not None])
        for conditions in ([batch.conditions for batch in batches], [first, second])
    )
    assert torch.equal(moved, given[[1, 2, 0]])
    loud = shaken(run.model)
    found = validate(replace(run, model=loud), batches, (0.9,), Accelerator(cpu=True), False)
    by_hand = 0.0
    for index, (batch, theirs) in enumerate(zip(batches, (first, second), strict=True)):
        losses = [
            validation_loss(
                loud,
                latents_of(run.autoencoder, batch),
                conditions,
                (0.9,),
                derive_seed(0, "validation", index),
            )["loss"]
            for conditions in (theirs, batch.conditions)
        ]
        by_hand += (losses[0] - losses[1]) * len(batch.frames) / 3
    assert found["action_gap"] == pytest.approx(by_hand, abs=1e-6) and by_hand != 0
    assert of_other_clips([batches[1].conditions]) == []


def train_steps(config: TrainConfig, num_steps: int) -> None:
    """Train until the process receives a SIGTERM, in the middle of its last step."""
    count = 0
    inner = clip_objective(config, build_model(config)).loss

    def objective(model, batch, generator):
        nonlocal count
        count += 1
        if count == num_steps * config.num_accumulation:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch, generator)

    with pytest.raises(Interrupted, match=f"SIGTERM after step {num_steps} of 4: saved"):
        train(config, objective_of(objective))


def test_loss_falls_and_everything_is_logged(config):
    config = replace(
        config,
        max_steps=40,
        log_every=10,
        validate_every=20,
        sample_every=40,
        optim=OptimConfig(optimizer="muon", lr=1e-2, muon_lr=1e-2, warmup_steps=2),
    )
    run = train(config)
    losses = [event["loss"] for event in read_log(run, "step")]
    assert losses[-1] < 0.95 * losses[0]
    validation = read_log(run, "validation")
    assert [event["step"] for event in validation] == [20, 40]
    assert validation[1]["loss"] < validation[0]["loss"]
    assert {f"loss_at_{time:g}" for time in config.validation_times} <= set(validation[0])
    names = [event["event"] for event in read_log(run)]
    assert names[0] == "start" and names[-1] == "end"
    assert (run / "samples" / "step_000040.png").read_bytes()[:4] == b"\x89PNG"
    world = load_world(run)
    assert world.card.conditions == CONDITIONS


def test_validation_is_of_the_averaged_weights_and_repeats(config, tmp_path):
    run = train(replace(config, validate_every=2, ema_decay=0.5))
    again = train(replace(config, validate_every=2, ema_decay=0.5, out=str(tmp_path / "again")))
    other = train(replace(config, validate_every=2, ema_decay=0.0, out=str(tmp_path / "other")))
    first, second, raw = (read_log(one, "validation") for one in (run, again, other))
    assert [event["loss"] for event in first] == [event["loss"] for event in second]
    assert first[-1]["loss"] != raw[-1]["loss"]


def test_accumulated_micro_batches_equal_one_large_batch(config, tmp_path):
    """Their noise differs, so an objective without noise is trained."""

    def objective(model, batch, generator):
        noisy = batch.frames[:, None]
        time = torch.full(noisy.shape[:3], 0.5)
        loss = (model(batch.frames, noisy, time, batch.conditions) - 1).square().mean()
        return loss, {"loss": loss.detach()}

    one = train(replace(config, batch_size=4, max_steps=2), objective_of(objective))
    two = train(
        replace(config, num_accumulation=2, max_steps=2, out=str(tmp_path / "two")),
        objective_of(objective),
    )
    expected, found = (load_world(run, "raw").model.state_dict() for run in (one, two))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step(config, bad, place):
    inner = clip_objective(config, build_model(config)).loss
    count, weights = 0, {}

    def objective(model, batch, generator):
        nonlocal count
        loss, logs = inner(model, batch, generator)
        if count == 2:
            weights.update({name: p.clone() for name, p in model.state_dict().items()})
            weights["model"] = model
            if place == "loss":
                loss = loss * bad
            else:
                loss.register_hook(lambda gradient: gradient * bad)
        count += 1
        return loss, logs

    with pytest.raises(ValueError, match="step 2: .*finite.*before the weights moved"):
        train(config, objective_of(objective))
    model = weights.pop("model")
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_time_limit_saves_and_stops(config):
    run = train(replace(config, max_steps=50_000, time_limit_s=0.5))
    end = read_log(run, "end")[0]
    assert "time limit of 0.5 s" in end["reason"] and 0 < end["step"] < 50_000
    assert load_progress(run / (run / "last").read_text().strip()).step == end["step"]


COMMAND = """
import sys
from scd.training.config import TrainConfig
from scd.common.config import from_json
from scd.training.world import train
import json
train(from_json(TrainConfig, json.load(open(sys.argv[1]))))
"""


def launch(config, path, *, prefix=()) -> subprocess.Popen[bytes]:
    from scd.common.config import to_json

    path.write_text(json.dumps(to_json(config)))
    script = path.with_suffix(".py")
    script.write_text(COMMAND)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *prefix, str(script), str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


SMALL_TOY = """--model.encoder.num-layers 1 --model.decoder.num-layers 1 --model.block.width 64
--batch-size 1 --num-frames 3 --log-every 1 --validate-every 0 --sample-every 0 --device cpu"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_the_command_says_that_it_was_interrupted(tmp_path, name, status):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "scd", "train", "toy", "--out", str(run), *SMALL_TOY.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (run / "log.jsonl").exists() or not read_log(run, "step"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors.decode()
    assert f"scd: {name} after step" in errors.decode() and b"Traceback" not in errors
    end = read_log(run, "end")[0]
    assert end["reason"] == f"received {name}"
    assert load_progress(run / (run / "last").read_text().strip()).step == end["step"] > 0


def test_a_second_process_is_kept_out_of_a_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    with take_lock(tmp_path / "run" / "lock"):
        with pytest.raises(BlockingIOError, match="run is being written by another process"):
            train(config)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["lock"]
    inner, refused = clip_objective(config, build_model(config)).loss, []

    def objective(model, batch, generator):
        if not refused:
            with pytest.raises(BlockingIOError):
                take_lock(tmp_path / "run" / "lock")
            refused.append(True)
        return inner(model, batch, generator)

    run = train(config, objective_of(objective))
    assert refused
    take_lock(run / "lock").close()
    (machine,) = read_log(run, "machine")
    assert machine["command"] == command() and machine["torch"] == torch.__version__


def test_a_finished_run_may_be_lengthened(config):
    train(config)
    run = train(replace(config, max_steps=6, log_every=3))
    assert [event["event"] for event in read_log(run) if event["event"] in ("start", "resume")] == [
        *("start", "resume")
    ]
    assert read_log(run, "end")[-1]["step"] == 6


def test_the_same_clips_in_other_words_and_a_moved_run_go_on(config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = Path(folder).rename(tmp_path / "clips")
    write_manifest(clips, [replace(entry, split="train") for entry in read_manifest(clips)])
    config = replace(config, data="clips", out="run", validate_every=0, sample_every=0)
    train(config)
    train(replace(config, max_steps=5, data=str(tmp_path / "clips")))
    # In another folder, and moved there.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(replace(config, max_steps=6, data="../clips"))
    shutil.copytree(tmp_path / "clips", tmp_path / "other")
    # A copy is as good, and what is no copy is not.
    write_manifest(tmp_path / "other", read_manifest(tmp_path / "other")[1:])
    with pytest.raises(ValueError, match=r"other is not the data that .* 2 episodes and had 3"):
        train(replace(config, max_steps=7, data="../other"))
    # All of it together.
    (tmp_path / "new").mkdir()
    for name in ("elsewhere", "clips"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    monkeypatch.chdir(tmp_path / "new")
    run = train(replace(config, max_steps=7, data="clips", out="elsewhere/run"))
    assert [event["step"] for event in read_log(run, "resume")] == [4, 5, 6]


def test_a_folder_with_other_settings_is_refused_with_what_differs(config, tmp_path):
    train(config)
    changed = replace(config, seed=1, optim=replace(config.optim, lr=5e-4))
    with pytest.raises(FileExistsError, match=r"optim\.lr: 0\.001, 0\.0005; seed: 0, 1"):
        train(changed)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(replace(config, resume="never"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(FileExistsError, match="not the folder of a run"):
        train(replace(config, out=str(tmp_path / "photos")))


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(config, tmp_path):
    run = train(config)
    path = run / "step_000004" / "raw.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"raw\.safetensors"):
        train(replace(config, max_steps=8))
    assert (run / "last").read_text().strip() == "step_000004"


def test_a_run_that_was_killed_before_its_settings_were_written_begins(config, tmp_path):
    """The lock and a file half written are all that such a run has left."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / f"{TEMPORARY}config.json-17").write_text("{")
    run = train(config)
    assert read_log(run, "end")[-1]["step"] == 4 and not list(run.glob(f"{TEMPORARY}*"))


def test_weights_that_are_not_finite_are_not_saved(config):
    """The loss of a step tells of the weights before it, so the last step's nobody would see."""
    optim = replace(config.optim, weight_decay=1e4, lr=1e4, decoder_lr_ratio=1e4, warmup_steps=0)
    with pytest.raises(ValueError, match=r"step 1: \d+ weights are not finite, or above 1e\+09"):
        train(replace(config, max_steps=1, optim=optim))
    assert not list(Path(config.out).glob("step_*"))


def test_differences_name_the_leaf():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2, 3"]
    assert differences({"a": 1}, {}) == ["a: 1, 'nothing'"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 50_000}, "clips of 50000 frames.*the longest of .* episodes has"),
        (
            {"num_frames": 50_000, "validate_every": 1},
            "num_frames is 50000, but the longest val episode.*has",
        ),
        ({"model": replace(SEPARABLE, conditions=replace(CONDITIONS, num_actions=99))}, "steered"),
        ({"num_frames": 3}, "window is 4, but num_frames is 3: attention beyond .* is untrained"),
        ({"data": "toy:64"}, r"\(3, 64, 64\).*\(3, 32, 32\)"),
        ({"data": "toy:7"}, "toy:7"),
        ({"max_steps": 0}, "max_steps must be 1 or more"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"batch_size": 2**62}, "batch_size must be 65536 at most"),
        ({"num_accumulation": 2**62}, "num_accumulation must be 65536 at most"),
        ({"num_loader_workers": 2**62}, "num_loader_workers must be 1024 at most"),
        ({"batch_size": 65536, "num_frames": 64}, "a batch of 65536 clips .* GiB are free"),
        ({"save_every": -1}, "save_every must be 0 or more"),
        ({"threads": 0}, "threads must be auto, or 1 or more, got 0"),
        ({"validation_times": (0.0,)}, "validation_times must lie in"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_folder_is_made(
    config, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))
    assert not (tmp_path / "run").exists()


def test_an_unknown_data_folder_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, data=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_two_processes_train_one_model(config, tmp_path):
    config = replace(
        config,
        save_every=2,
        validate_every=2,
        sample_every=4,
        num_accumulation=2,
        gradient_checkpointing=True,
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for max_steps in (2, 4):
        steps = replace(config, max_steps=max_steps)
        process = launch(steps, tmp_path / "config.json", prefix=launcher)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    run = tmp_path / "run"
    assert read_log(run, "start")[0]["num_processes"] == 2
    assert [event["step"] for event in read_log(run, "step")] == [1, 2, 3, 4]
    assert len(read_log(run, "validation")) == 2
    assert load_world(run).card.conditions == CONDITIONS
    assert (run / "samples" / "step_000004.png").exists()
