"""Interventions in a trained dense model: what they change, and the comparison from end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.cli import main
from scd.data.clip import Conditions, frames_to_pixels
from scd.data.manifest import CARD_FILE, write_card, write_episode, write_manifest
from scd.models.build import build
from scd.models.checkpoint import World, load_world, resolve, save_world
from scd.models.config import CacheConfig, Join, SamplingConfig
from scd.models.progress import load_progress
from scd.objectives.config import DenoiseConfig
from scd.optim.config import OptimConfig
from scd.probing.changes import change_world, diagonal, recompose, skipping
from scd.probing.compare import intervene
from scd.probing.intervention_models import finetuning, read_start, same_control
from scd.probing.interventions import (
    Comparison,
    DiagonalConfig,
    RecomposeConfig,
    SkipConfig,
    Split,
    split_of,
)
from scd.training.config import TrainConfig
from scd.training.world import train
from tests.tiny import random_clips, random_conditions, tiny_dense

SAMPLING = SamplingConfig(num_steps=4)
NOWHERE = Comparison(run="run", out="out")


@pytest.fixture(scope="module")
def data(tmp_path_factory, toy_source) -> str:
    """Four episodes of the toy world as files."""
    path, entries = tmp_path_factory.mktemp("clips") / "data", []
    for episode, split in enumerate(("train", "train", "val", "val")):
        clip = toy_source.read(episode, 0, 12)
        pixels, actions = frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()
        entries.append(write_episode(path, f"e{episode}", pixels, actions, 10.0, split))
    write_card(path, toy_source.card)
    write_manifest(path, entries)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> str:
    """A dense run of three layers and three steps."""
    return str(train(dense_run(data, str(tmp_path_factory.mktemp("dense") / "run"))))


def dense_run(data: str, out: str) -> TrainConfig:
    model = tiny_dense().config
    return TrainConfig(
        data=data,
        out=out,
        max_steps=3,
        num_frames=4,
        validate_every=0,
        sample_every=0,
        save_every=0,
        device="cpu",
        model=replace(
            model,
            shape=replace(model.shape, height=32, width=32, patch_size=16),
            conditions=replace(model.conditions, num_actions=5),
            cache=CacheConfig(window=4),
        ),
        objective=DenoiseConfig(context_noise=0.0, num_draws=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        sampling=SamplingConfig(num_steps=2),
    )


def comparison(run, out, **changes) -> Comparison:
    return Comparison(
        **{
            "run": run,
            "out": str(out),
            "max_steps": 2,
            "warmup_steps": 0,
            "context": 2,
            "horizon": 2,
            "num_clips": 4,
            "timed_frames": 2,
            "device": "cpu",
        }
        | changes
    )


@torch.no_grad()
def test_layers_of_a_separable_model_are_copies_of_the_dense_ones():
    model = tiny_dense()
    split = Split(encoder=(1, 2), decoder=(1, 3))
    made = recompose(model, split, "prefix")
    for part, layers in ((made.encoder, split.encoder), (made.decoder, split.decoder)):
        for block, layer in zip(part.blocks, layers, strict=True):
            expected = model.blocks[layer - 1].state_dict()
            for name, weight in block.state_dict().items():
                assert torch.equal(weight, expected[name])
    copied = made.encoder.blocks[0].mlp[0].weight
    assert copied.data_ptr() != made.decoder.blocks[0].mlp[0].weight.data_ptr()
    # The embeddings work as they did, the output of the encoder is normed and nothing else.
    conditions = random_conditions(model.config.conditions, 2, 4, torch.manual_seed(0))
    for part in (made.encoder, made.decoder):
        assert torch.equal(part.embed_conditions(conditions), model.embed_conditions(conditions))
    clean, *_ = random_clips(model)
    assert torch.equal(made.encoder.embed_frame(clean), model.embed_frame(clean))
    context = made.encoder(clean, random_clips(model)[3])
    assert torch.equal(context.norm_scale, torch.ones_like(context.norm_scale))
    # But for what keeps the norm from dividing by zero.
    deviation = context.tokens.std(-1, correction=0)
    torch.testing.assert_close(deviation, torch.ones(2, 5, 6), atol=1e-4, rtol=0)
    assert torch.equal(made.encoder.start, model.embed_frame(torch.zeros(1, 1, 3, 4, 6))[0, 0])
    assert made.config.decoder.predict == model.config.predict


@torch.no_grad()
def test_a_row_of_the_encoder_is_what_the_dense_model_makes_of_a_clean_frame():
    """The same action and no start frame before it: then the first layers compute the same."""
    model = tiny_dense()
    made = recompose(model, Split(encoder=(1, 2), decoder=(3,)), "token_concat")
    clean, _, _, conditions = random_clips(model, num_frames=3)
    seen = []
    made.encoder.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    # The row of a frame carries the next frame's action: all actions are one here.
    same = Conditions(actions=torch.ones_like(conditions.actions))
    cache = made.encoder.new_cache(made.config.cache, 2)
    for frame in range(3):
        made.encoder.extend(cache, clean[:, frame : frame + 1], same.frames(0, 1), frame)
    rows = torch.cat(seen, dim=1)
    seen.clear()
    model.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    state = model.begin(clean[:, :0], same.frames(0, 0))
    for frame in range(3):
        model.observe(state, clean[:, frame], same.frames(0, 1))
    torch.testing.assert_close(rows, torch.cat(seen, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("join", ["prefix", "token_concat", "channel_concat"])
def test_a_recomposed_model_trains_and_streams(join: Join, tmp_path):
    made = recompose(tiny_dense(), Split(encoder=(1, 2), decoder=(1, 3)), join)
    made(*random_clips(made)).square().mean().backward()
    silent = [name for name, weight in made.named_parameters() if weight.grad is None]
    assert not silent
    assert build(made.config).load_state_dict(made.state_dict())


@pytest.mark.parametrize(
    ("given", "encoder", "decoder"),
    [
        ({"encoder": 8, "decoder": "2+4"}, 8, (1, 2, 9, 10, 11, 12)),
        ({"encoder": 12, "decoder": "0+1"}, 12, (12,)),
        ({"encoder": 1, "decoder": "6+6"}, 1, tuple(range(1, 13))),
        ({"proposed": (8, [1, 2, 11, 12])}, 8, (1, 2, 11, 12)),
    ],
)
def test_splits_are_read(given, encoder, decoder, tmp_path):
    if "proposed" in given:
        path = tmp_path / "probe.json"
        layers = dict(zip(("encoder_layers", "decoder_layers"), given["proposed"], strict=True))
        path.write_text(json.dumps({"proposed_split": layers}))
        given = {"split": str(path)}
    split = split_of(RecomposeConfig(comparison=NOWHERE, **given), 12)
    assert split == Split(encoder=tuple(range(1, encoder + 1)), decoder=decoder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "by encoder and decoder, or by a probe.json"),
        ({"encoder": 2, "decoder": "1+1", "split": "a.json"}, "not by both"),
        ({"encoder": 2, "decoder": "1-2"}, r'like "2\+4", got \'1-2\''),
        ({"encoder": 2}, "got ''"),
        ({"encoder": 13, "decoder": "1+1"}, r"encoder must have 1 \.\. 12 layers, got 13"),
        ({"encoder": 0, "decoder": "1+1"}, r"encoder must have 1 \.\. 12 layers, got 0"),
        ({"encoder": 2, "decoder": "9+9"}, r"9\+9 are more layers than the model's 12"),
        ({"encoder": 2, "decoder": "0+0"}, r"decoder must be rising numbers"),
    ],
)
def test_splits_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_of(RecomposeConfig(comparison=NOWHERE, **given), 12)


def test_a_result_without_a_split_is_refused(tmp_path):
    path = tmp_path / "probe.json"
    for text in ("{}", '{"proposed_split": {"encoder_layers": [1, 2], "decoder_layers": [1]}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no proposed_split"):
            split_of(RecomposeConfig(comparison=NOWHERE, split=str(path)), 12)


def test_a_split_that_a_probe_does_not_recommend_is_taken_only_on_request(tmp_path):
    path = tmp_path / "probe.json"
    split = {"encoder_layers": 3, "decoder_layers": [1, 11, 12], "is_recommended": False}
    result = {"proposed_split": split, "warnings": ["it predicts no better than the mean"]}
    path.write_text(json.dumps(result))
    config = RecomposeConfig(comparison=NOWHERE, split=str(path))
    with pytest.raises(ValueError, match="no split: it predicts no better.*--unrecommended"):
        split_of(config, 12)
    taken = split_of(replace(config, unrecommended=True), 12)
    assert (taken.encoder, taken.decoder) == ((1, 2, 3), (1, 11, 12))
    path.write_text(json.dumps({"proposed_split": split | {"is_recommended": True}}))
    assert split_of(config, 12) == taken
    with pytest.raises(ValueError, match="unrecommended has no effect"):
        split_of(RecomposeConfig(comparison=NOWHERE, encoder=1, unrecommended=True), 12)


@pytest.mark.parametrize(
    ("span", "full_steps", "message"),
    [
        ((0, 1), 2, r"layers must lie in 1 \.\. 3 and leave some, got 0 \.\. 1"),
        ((2, 4), 2, r"got 2 \.\. 4"),
        ((3, 2), 2, r"got 3 \.\. 2"),
        ((1, 3), 2, "leave some"),
        ((2, 2), 4, "fewer than the 4 steps of a frame, got 4"),
        ((2, 2), 0, "full_steps must be 1 or more"),
    ],
)
def test_what_cannot_be_skipped_is_refused(span, full_steps, message):
    with pytest.raises(ValueError, match=message):
        skipping(tiny_dense(), span, full_steps, SAMPLING)


def test_layers_are_written_as_a_range():
    config = SkipConfig(comparison=NOWHERE, layers="4-8", full_steps=5)
    assert config.span == (4, 8)
    assert replace(config, layers="3").span == (3, 3)
    with pytest.raises(ValueError, match="as \"4-8\", got '4,8'"):
        assert replace(config, layers="4,8").span
    model = skipping(tiny_dense(), (2, 3), 2, SAMPLING)
    assert list(model.config.skip.layers) == [1, 2]


@pytest.mark.parametrize("last", [0, 3, -1])
def test_what_cannot_be_diagonal_is_refused(last):
    with pytest.raises(ValueError, match=rf"last must lie in 1 \.\. 2.*got {last}"):
        diagonal(tiny_dense(), last)


def test_a_model_is_changed_once():
    skipped = skipping(tiny_dense(), (2, 2), 2, SAMPLING)
    with pytest.raises(ValueError, match="skips layers already"):
        skipping(skipped, (3, 3), 2, SAMPLING)
    turned = diagonal(tiny_dense(), 1)
    with pytest.raises(ValueError, match="last 1 layers are diagonal already"):
        diagonal(turned, 2)
    for model in (skipped, turned):
        with pytest.raises(ValueError, match="cannot be recomposed"):
            recompose(model, Split(encoder=(1,), decoder=(3,)), "prefix")
    # One after the other is possible.
    assert diagonal(skipped, 1).config.skip == skipped.config.skip


def test_a_separable_model_is_split_already(separable_config, toy_source):
    autoencoder = PixelAutoencoder(PixelConfig())
    world = World(build(separable_config), autoencoder, toy_source.card, SAMPLING)
    for intervention in (
        SkipConfig(comparison=NOWHERE, layers="1", full_steps=1),
        DiagonalConfig(comparison=NOWHERE, last=1),
        RecomposeConfig(comparison=NOWHERE, encoder=1, decoder="0+1"),
    ):
        with pytest.raises(ValueError, match="is split already"):
            change_world(intervention, world)


def weights(path) -> bytes:
    return (resolve(path) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def skipped(run, tmp_path_factory) -> dict:
    """The result of skipping a layer."""
    common = comparison(run, tmp_path_factory.mktemp("skip") / "out")
    return intervene(SkipConfig(comparison=common, layers="2", full_steps=1))


def test_an_intervention_from_end_to_end(run, skipped):
    result, out = skipped, Path(skipped["settings"]["comparison"]["out"])
    assert result["intervention"] == "skip"
    assert list(result["models"]) == ["untouched", "before", "after", "control"]
    assert [model["steps"] for model in result["models"].values()] == [3, 3, 5, 5]
    found = {(row["model"], row["metric"], row["horizon"]) for row in result["rows"]}
    assert {(name, "psnr", h) for name in result["models"] for h in (1, 2)} <= found
    changed, plain = load_world(out / "before").model, load_world(run).model
    for name, weight in plain.state_dict().items():
        assert torch.equal(changed.state_dict()[name], weight)
    assert changed.config == load_world(out / "after").model.config != plain.config
    assert load_world(out / "control").model.config == plain.config
    assert json.loads((out / "intervention.json").read_text())["rows"] == result["rows"]
    table = (out / "table.md").read_text().splitlines()
    assert len(table) > 6 and all(line.count("|") == table[0].count("|") for line in table[:6])
    assert (out / "intervention.png").read_bytes()[:4] == b"\x89PNG"


def test_a_recomposition_is_resumed_where_it_was(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["intervene", "recompose", run, "--out", str(out), "--encoder", "2"]
    words += ["--decoder", "1+1", "--max-steps", "2", "--warmup-steps", "0", "--context", "2"]
    words += ["--horizon", "2", "--num-clips", "4", "--timed-frames", "2", "--device", "cpu"]
    words += ["--no-control"]
    assert main(words) == 0
    assert "separable from scratch" in capsys.readouterr().out
    result = json.loads((out / "intervention.json").read_text())
    models = result["models"]
    assert list(models) == ["untouched", "before", "after", "scratch"]
    assert models["after"]["kind"] == models["scratch"]["kind"] == "SeparableDiffuser"
    after, scratch = (models[name]["train_flops"] for name in ("after", "scratch"))
    assert abs(after - scratch) <= scratch / models["scratch"]["steps"]
    assert load_progress(resolve(out / "scratch")).step == models["scratch"]["steps"]

    before = {name: weights(out / name) for name in ("after", "scratch")}
    rows = result["rows"]
    (out / "evaluations" / "after.json").unlink()
    assert main(words) == 0
    again = json.loads((out / "intervention.json").read_text())
    assert again["rows"] == rows
    assert {name: weights(out / name) for name in before} == before
    assert main([*words, "--lr-factor", "1.0"]) == 2
    assert "another intervention" in capsys.readouterr().err


def test_a_control_serves_two_interventions_of_the_same_run(run, skipped, tmp_path):
    first = skipped["settings"]["comparison"]["out"]
    common = comparison(run, tmp_path / "out", control_from=first)
    result = intervene(DiagonalConfig(comparison=common, last=1))
    assert "control" in result["models"] and not (tmp_path / "out" / "control").exists()
    rows = [row for row in skipped["rows"] if row["model"] == "control"]
    assert [row for row in result["rows"] if row["model"] == "control"] == rows
    assert load_world(tmp_path / "out" / "after").model.config.num_diagonal == 1
    other = replace(common, out=str(tmp_path / "other"), lr_factor=1.0)
    with pytest.raises(ValueError, match=r"control of .* has other settings.*optim\.lr"):
        intervene(DiagonalConfig(comparison=other, last=1))
    assert not (tmp_path / "other" / "after").exists()
    with pytest.raises(ValueError, match="no effect without control"):
        replace(common, control=False)


def test_starts_in_several_files_are_told_apart(run, tmp_path, monkeypatch):
    first = replace(NOWHERE, run=run, out=str(tmp_path / "first"), max_steps=1, device="cpu")
    start, world = read_start(first)
    monkeypatch.setattr("scd.models.checkpoint.SHARD_BYTES", 20_000)
    for name in ("first", "second"):
        save_world(world, tmp_path / name / "untouched")
        assert not (tmp_path / name / "untouched" / "model.safetensors").exists()
    config = finetuning(start, first, world, tmp_path / "first" / "untouched")
    train(replace(config, out=str(tmp_path / "first" / "control")))
    config = replace(config, initial=str(tmp_path / "second" / "untouched"))
    assert same_control(config, tmp_path / "first") == tmp_path / "first" / "control"
    save_world(load_world(tmp_path / "first" / "control"), tmp_path / "second" / "untouched")
    with pytest.raises(ValueError, match="started from other weights"):
        same_control(config, tmp_path / "first")


def test_a_world_has_no_settings_of_training(run, tmp_path):
    world = save_world(load_world(run), tmp_path / "world")
    with pytest.raises(ValueError, match="without the settings of its training"):
        intervene(DiagonalConfig(comparison=comparison(str(world), tmp_path / "out"), last=1))


def test_data_with_other_conditions_is_refused(run, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    card = json.loads((other / CARD_FILE).read_text())
    card["conditions"]["num_actions"] = 7
    card["action_names"] = [f"key {key}" for key in range(7)]
    (other / CARD_FILE).write_text(json.dumps(card))
    common = comparison(run, tmp_path / "out", data=str(other))
    with pytest.raises(ValueError, match="is not steered as the model is .*num_actions: 5, 7"):
        intervene(DiagonalConfig(comparison=common, last=1))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.png").touch()
    with pytest.raises(FileExistsError, match="holds no intervention"):
        intervene(DiagonalConfig(comparison=comparison(run, tmp_path / "out"), last=1))
