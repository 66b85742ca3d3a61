"""A run that starts from the weights of another world."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from scd.autoencoders.deep_compression import deep_settings
from scd.autoencoders.diffusers import new_network, open_image_autoencoder, save_network
from scd.cli import main
from scd.common.runlog import read_log
from scd.common.runtime import make_generator
from scd.data.clip import Batch, frames_to_pixels
from scd.data.loader import Loader
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.record import record
from scd.data.source import open_source
from scd.data.toy import ToyRecording
from scd.evaluation.predict import check_fit
from scd.models.build import build
from scd.models.checkpoint import World, load_world, resolve, save_world
from scd.models.config import CacheConfig, FrameShape, SamplingConfig
from scd.models.shipped import ship
from scd.optim.config import OptimConfig
from scd.training.config import TrainConfig
from scd.training.fit import fit_to_data
from scd.training.world import clip_objective, train


def brief(model, out) -> TrainConfig:
    return TrainConfig(
        out=str(out),
        max_steps=2,
        num_frames=4,
        log_every=1,
        validate_every=0,
        sample_every=0,
        save_every=0,
        device="cpu",
        seed=1,
        model=replace(model, cache=CacheConfig(window=4)),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        sampling=SamplingConfig(num_steps=1),
    )


@pytest.fixture
def config(tmp_path, separable_config) -> TrainConfig:
    return brief(separable_config, tmp_path / "second")


@pytest.fixture(scope="module")
def first(tmp_path_factory, separable_config) -> str:
    config = brief(separable_config, tmp_path_factory.mktemp("first") / "run")
    return str(train(replace(config, seed=0)))


def test_a_run_begins_with_the_averaged_weights_of_the_first(config, first):
    run = train(replace(config, initial=first))
    batch = Loader(open_source(config.data, "train"), 2, 4, seed=1).batch(0)
    generator = make_generator(1, "train", 0, 0, 0)
    world = load_world(first)
    objective = clip_objective(config, world.model)
    expected, _ = objective.loss(world.model.train(), batch, generator)
    assert read_log(run, "step")[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    raw = load_world(first, "raw").model.state_dict()
    assert any(not torch.equal(raw[name], ema) for name, ema in world.model.state_dict().items())


def test_a_run_goes_on_without_the_world_it_started_from(config, first, tmp_path):
    copy = shutil.copytree(first, tmp_path / "copy")
    config = replace(config, initial=str(copy))
    whole = train(replace(config, max_steps=4, out=str(tmp_path / "whole")))
    train(config)
    shutil.rmtree(copy)
    part = train(replace(config, max_steps=4))
    names = ("model.safetensors", "raw.safetensors", "optimizer.pt")
    for name in names:
        assert (resolve(part) / name).read_bytes() == (resolve(whole) / name).read_bytes()


def test_another_initial_is_another_run(config, first, tmp_path):
    train(replace(config, initial=first))
    with pytest.raises(FileExistsError, match=f"initial: '{first}', ''"):
        train(config)


def test_a_run_from_before_there_was_the_field_goes_on(config):
    run = train(config)
    settings = json.loads((run / "config.json").read_text())
    del settings["initial"]
    (run / "config.json").write_text(json.dumps(settings))
    train(replace(config, max_steps=3))
    assert read_log(run, "end")[-1]["step"] == 3


def test_a_longer_memory_is_no_other_model(config, first):
    model = replace(config.model, cache=CacheConfig(window=3))
    assert train(replace(config, initial=first, model=model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: {"encoder": replace(model.encoder, num_layers=2)}, "num_layers: 1, 2"),
        (lambda model: {"decoder": replace(model.decoder, join="prefix")}, "'token_concat', 'pre"),
        (lambda model: {"block": replace(model.block, rotary_theta=9.0)}, "theta: 10000.0, 9.0"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_first_difference(
    config, first, change, message
):
    model = replace(config.model, **change(config.model))
    with pytest.raises(ValueError, match=f"{first} are for another model.*{message}"):
        train(replace(config, initial=first, model=model))


def test_another_kind_of_model_is_refused(config, first, dense_config):
    model = replace(dense_config, cache=CacheConfig(window=4))
    objective = replace(config.objective, context_noise=0.0)
    with pytest.raises(ValueError, match=r"model\.kind: 'SeparableConfig', 'DenseConfig'"):
        train(replace(config, initial=first, model=model, objective=objective))


def test_a_world_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, initial=str(tmp_path / "nowhere")))


def test_clips_of_another_rate_than_the_world_are_refused(config, first, tmp_path):
    """The toy world, of 10 frames/s, meets its own clips written at 20."""
    toy, data = open_source("toy:32", "train"), tmp_path / "clips"
    entries = []
    for episode in range(2):
        clip = toy.read(episode, 0, 20)
        pixels, actions = frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()
        entries.append(write_episode(data, f"e{episode}", pixels, actions, 20.0, "train"))
    write_card(data, replace(toy.card, fps=20.0))
    write_manifest(data, entries)
    config = replace(config, data=str(data), initial=first)
    with pytest.raises(ValueError, match=rf"run makes 10 frames/s, {data} has 20: .*CLIPS.fps=10"):
        train(config)
    with pytest.raises(ValueError, match=r"the model makes 10 frames/s, mine has 20"):
        check_fit(load_world(first), open_source(str(data), "train").card, "mine")
    run = train(replace(config, data=f"{data}?fps=10"))
    assert load_world(run).card.fps == 10


@pytest.fixture(scope="module")
def carrying(tmp_path_factory, separable_config) -> str:
    """A shipped world of latents, with their autoencoder in its folder."""
    toy, place = open_source("toy:32", "train"), tmp_path_factory.mktemp("carrying")
    torch.manual_seed(0)
    save_network(new_network(deep_settings("small-16")), place / "autoencoder")
    shape = FrameShape(channels=32, height=2, width=2, patch_size=1)
    world = World(
        model=build(replace(separable_config, shape=shape)).eval(),
        autoencoder=open_image_autoencoder(place / "autoencoder"),
        card=toy.card,
        sampling=SamplingConfig(num_steps=2),
    )
    clips = Batch.of([toy.read(0, 0, 5)])
    return str(ship(save_world(world, place / "run"), clips, place / "shipped"))


def test_a_world_that_carries_its_autoencoder_learns_on(config, carrying, tmp_path):
    """On the latents that its own autoencoder makes; as the start of a run, and as a teacher."""
    videos, latents = tmp_path / "videos", tmp_path / "latents"
    record(ToyRecording(out=str(videos), episodes=6, frames=8, workers=1, val_fraction=0.3))
    words = ["encode", str(videos), "--autoencoder", carrying, "--out", str(latents)]
    assert main(words) == 0
    model = load_world(carrying).model.config
    config = replace(config, data=str(latents), model=replace(model, cache=config.model.cache))
    run = load_world(train(fit_to_data(replace(config, initial=carrying))))
    assert run.autoencoder.config == load_world(carrying).autoencoder.config
    assert run.autoencoder.decode(torch.zeros(1, 1, 32, 2, 2)).shape == (1, 1, 3, 32, 32)
    words = ["distill", carrying, "--data", str(latents), "--method", "consistency", "--steps", "2"]
    words += ["--max-steps", "1", "--sample-every", "0", "--validate-every", "0"]
    student = tmp_path / "student"
    assert main([*words, "--num-frames", "4", "--batch-size", "1", "--out", str(student)]) == 0
    made = load_world(student).autoencoder
    assert made.decode(torch.zeros(1, 1, 32, 2, 2)).shape == (1, 1, 3, 32, 32)
