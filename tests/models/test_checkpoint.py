"""Worlds and checkpoints on disk, whole or damaged."""

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.common import files
from scd.common.files import remove_leftovers, written_aside
from scd.common.weights import digest_of
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.models.build import SeparableDiffuser, build
from scd.models.checkpoint import (
    World,
    last_step,
    load_optimizers,
    load_world,
    save_step,
    save_world,
    write_world,
)
from scd.models.config import (
    BlockConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.progress import Progress, load_progress
from scd.models.weights import WEIGHTS_FILE

SPEC = ConditionSpec(num_actions=2)
SMALL = BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6))
SEPARABLE = SeparableConfig(
    block=SMALL,
    encoder=EncoderConfig(num_layers=1),
    decoder=DecoderConfig(num_layers=1),
    conditions=SPEC,
)


def make_world(config=SEPARABLE, seed=0) -> World:
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig(mean=-0.25, std=0.5)),
        card=DataCard(height=32, width=32, fps=8.0, conditions=SPEC, action_names=("l", "r")),
        sampling=SamplingConfig(num_steps=3),
    )


def write_step(run, world, step, keep=10, optimizers=None):
    run.mkdir(exist_ok=True)
    averaged = {name: p.detach() * 0.5 for name, p in world.model.named_parameters()}
    progress = Progress(step=step, num_ema_updates=step, num_processes=1, elapsed_s=1.5)
    raw = world.model.state_dict()

    def write(folder):
        write_world(world, raw | averaged, folder)

    return save_step(run, write, raw, optimizers or [{"state": {}}], progress, keep)


def same_weights(one, other, factor=1.0) -> bool:
    other = other.state_dict()
    return all(torch.equal(w * factor, other[name]) for name, w in one.state_dict().items())


@pytest.mark.parametrize("config", [SEPARABLE, DenseConfig(block=SMALL, conditions=SPEC)])
def test_a_world_comes_back_as_it_was(tmp_path, config):
    world = make_world(config)
    save_world(world, tmp_path / "world")
    loaded = load_world(tmp_path / "world")
    assert same_weights(world.model, loaded.model)
    assert loaded.model.config == world.model.config
    assert loaded.autoencoder.config == world.autoencoder.config
    assert (loaded.card, loaded.sampling) == (world.card, world.sampling)
    assert not loaded.model.training


def test_a_world_replaces_a_world_but_nothing_else(tmp_path):
    save_world(make_world(seed=0), tmp_path / "world")
    newer = make_world(seed=1)
    save_world(newer, tmp_path / "world")
    assert same_weights(newer.model, load_world(tmp_path / "world").model)
    (tmp_path / "world" / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="diary.txt"):
        save_world(newer, tmp_path / "world")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["world"]


def test_a_world_that_is_replaced_while_it_is_read_is_read_whole(tmp_path):
    folder, worlds = tmp_path / "world", [make_world(seed=seed) for seed in range(2)]
    worlds[1].sampling = SamplingConfig(num_steps=9)
    save_world(worlds[0], folder)
    stop = threading.Event()

    def replace_again():
        number = 0
        while not stop.wait(0.1):
            number += 1
            save_world(worlds[number % 2], folder)

    writer = threading.Thread(target=replace_again)
    writer.start()
    try:
        for _ in range(30):
            found = load_world(folder)
            (like,) = [world for world in worlds if world.sampling == found.sampling]
            assert same_weights(like.model, found.model)
    finally:
        stop.set()
        writer.join()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "world"
    with written_aside(folder) as aside:
        (aside / "text").write_text("old")
    rename = Path.rename

    def fail_to_replace(self, target):
        if target == folder and not self.name.endswith("-old"):
            raise OSError("the disk is gone")
        return rename(self, target)

    with monkeypatch.context() as patch:
        # As on a file system that cannot exchange two folders.
        patch.setattr(files, "SWAP", 1 << 20)
        patch.setattr(Path, "rename", fail_to_replace)
        with pytest.raises(OSError, match="the disk is gone"), written_aside(folder) as aside:
            (aside / "text").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
    assert (folder / "text").read_text() == "old"


def test_the_model_class_reads_a_world_folder_too(tmp_path):
    world = make_world()
    save_world(world, tmp_path / "world")
    model = SeparableDiffuser.from_pretrained(tmp_path / "world")
    assert same_weights(world.model, model)


def test_a_model_alone_is_not_a_world_and_the_error_says_what_lacks(tmp_path):
    make_world().model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="missing fields.*autoencoder.*card.*sampling"):
        load_world(tmp_path / "model")


def test_a_run_gives_averaged_or_raw_weights_of_its_newest_step(tmp_path):
    older, newer = make_world(seed=0), make_world(seed=1)
    write_step(tmp_path / "run", older, 5)
    newest = write_step(tmp_path / "run", newer, 10)
    assert newest.name == "step_000010"
    assert last_step(tmp_path / "run") == newest
    for path in (tmp_path / "run", newest):
        assert same_weights(newer.model, load_world(path).model, 0.5)
        assert same_weights(newer.model, load_world(path, "raw").model)
    assert same_weights(older.model, load_world(tmp_path / "run" / "step_000005", "raw").model)


def test_a_saved_world_has_no_raw_weights(tmp_path):
    save_world(make_world(), tmp_path / "world")
    with pytest.raises(FileNotFoundError, match="no raw weights"):
        load_world(tmp_path / "world", "raw")


def test_only_the_newest_steps_are_kept_in_order_of_their_number(tmp_path):
    world = make_world()
    for step in (999_999, 1_000_000, 1_000_001):
        write_step(tmp_path / "run", world, step, keep=2)
    left = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert left == {"step_1000000", "step_1000001", "last"}


def test_progress_and_optimizer_state_come_back(tmp_path):
    state = [{"state": {0: {"exp_avg": torch.arange(3.0)}}, "param_groups": [{"lr": 0.1}]}]
    folder = write_step(tmp_path / "run", make_world(), 7, optimizers=state)
    loaded = load_optimizers(folder)
    assert torch.equal(loaded[0]["state"][0]["exp_avg"], torch.arange(3.0))
    assert load_progress(folder) == Progress(
        step=7, num_ema_updates=7, num_processes=1, elapsed_s=1.5
    )


class Bomb:
    def __reduce__(self):
        return print, ("code of a stranger runs",)


def test_an_optimizer_file_that_carries_code_is_refused(tmp_path, capsys):
    folder = write_step(tmp_path / "run", make_world(), 1)
    torch.save([{"state": Bomb()}], folder / "optimizer.pt")
    with pytest.raises(ValueError, match="read as a state of training: it holds an object"):
        load_optimizers(folder)
    assert "stranger" not in capsys.readouterr().out


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(colour=1), "unknown fields.*colour"),
        (lambda v: v["model"].pop("block"), "missing fields.*block"),
        (lambda v: v.pop("card"), "missing fields.*card"),
        (lambda v: v.update(extra=1), "unknown fields.*extra"),
        (lambda v: v.update(format="scd-99"), "scd-1.*scd-99"),
        (lambda v: v["model"].update(kind="Oracle"), "DenseConfig.*SeparableConfig.*Oracle"),
        (lambda v: v["sampling"].update(num_steps=0), "num_steps must be 1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save_world(make_world(), tmp_path / "world")
    edit_config(tmp_path / "world", change)
    with pytest.raises(ValueError, match=message):
        load_world(tmp_path / "world")


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_world(make_world(), tmp_path / "world")
    deeper = SeparableConfig(block=SMALL, encoder=EncoderConfig(num_layers=2), conditions=SPEC)
    save_world(make_world(deeper), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "world")
    with pytest.raises(ValueError, match="another architecture.*unknown"):
        load_world(tmp_path / "world")


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_truncated_weights_file_is_named(tmp_path, kept):
    save_world(make_world(), tmp_path / "world")
    path = tmp_path / "world" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_world(tmp_path / "world")


@pytest.mark.parametrize("name", ["optimizer.pt", "progress.json"])
def test_truncated_training_state_is_named(tmp_path, name):
    folder = write_step(tmp_path / "run", make_world(), 1)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        load_optimizers(folder)
        load_progress(folder)


@pytest.mark.parametrize("content", [None, "nothing", "empty run"])
def test_a_folder_without_a_world_is_named(tmp_path, content):
    folder = tmp_path / "place"
    if content:
        folder.mkdir()
    if content == "empty run":
        (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="place"):
        load_world(folder)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path):
    world = make_world()
    run = tmp_path / "run"
    write_step(run, world, 1)
    small = (run / "step_000001" / "model.safetensors").stat().st_size
    before = sorted(entry.name for entry in run.rglob("*"))
    state = [{"state": {0: torch.zeros(small)}}]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # First the weights cannot be written, then only the optimizer's larger state.
    for limit in (small // 2, small * 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match="could not write.*GiB free"):
                write_step(run, world, 2, optimizers=state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(entry.name for entry in run.rglob("*")) == before
        assert same_weights(world.model, load_world(run, "raw").model)


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import make_world, write_step
world, step = make_world(), 1
write_step(Path({run!r}), world, step)
while True:
    step += 1
    write_step(Path({run!r}), world, step, optimizers=[{{"state": torch.zeros(5_000_000)}}])
"""


def large_file_begun(run) -> bool:
    for path in run.glob(".writing-*/optimizer.pt"):
        try:
            return path.stat().st_size > 1_000_000
        except FileNotFoundError:
            pass
    return False


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_checkpoint(tmp_path, request):
    run = tmp_path / "run"
    code = SAVE_FOREVER.format(tests=str(request.path.parent), run=str(run))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    try:
        # Kill while the large file is being written aside and a checkpoint is there already.
        while not large_file_begun(run):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(run.glob(".writing-*")), "the process was not killed in the middle of a save"
    folder = last_step(run)
    assert folder is not None
    assert same_weights(make_world().model, load_world(run, "raw").model)
    assert load_progress(folder).step >= 1
    assert load_optimizers(folder)
    remove_leftovers(run)
    assert not list(run.glob(".writing-*"))


def test_a_world_in_several_files_is_replaced_and_known_by_all_of_them(tmp_path, monkeypatch):
    folder, world = tmp_path / "world", make_world()
    save_world(world, folder)
    path = folder / WEIGHTS_FILE
    assert digest_of(path, "sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    short = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert digest_of(path, "blake2b") == short
    monkeypatch.setattr("scd.models.checkpoint.SHARD_BYTES", 20_000)
    monkeypatch.setattr("scd.common.weights.DIGEST_BLOCK", 1000)
    save_world(world, folder)
    assert not path.exists() and len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    first = digest_of(path, "sha256")
    # Again, and with other weights.
    save_world(world, folder)
    assert digest_of(path, "sha256") == first
    save_world(make_world(seed=1), folder)
    assert digest_of(path, "sha256") != first
    (folder / "raw.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match="other things than a world"):
        save_world(world, folder)
    next(folder.glob("model-*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the files"):
        digest_of(path, "sha256")
