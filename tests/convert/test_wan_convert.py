"""Wan's weights into worlds and back: recomposition, bit-equal round trips, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from scd.cli import main
from scd.common.weights import Weights
from scd.convert.export import export_diffusers
from scd.convert.wan import ConvertWanConfig, convert_wan, read_split
from scd.data.clip import Conditions
from scd.models.checkpoint import load_world
from scd.models.flow import schedule
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser
from scd.models.wan.source import from_original, to_original
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE
from scd.streaming.rollout import Rollout
from tests.tiny_wan import (
    BLOCK,
    NUM_LAYERS,
    SHAPE,
    random_text,
    tiny_transformer,
    wan_clips,
    write_tiny_transformer,
)

SMALL = {"height": 32, "width": 48, "text_length": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_transformer(tmp_path_factory.mktemp("source"))


def stored(path):
    with Weights(path, as_stored=True) as weights:
        return {name: weights.get(name).clone() for name in weights.names()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8 if tensor.dtype != torch.bfloat16 else torch.int16)


def assert_bit_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def test_parts_are_made_of_the_sources_layers(source, tmp_path):
    world = load_world(
        convert_wan(
            ConvertWanConfig(model=str(source), out=str(tmp_path / "run"), split="4,2+1", **SMALL)
        )
    )
    model = world.model
    assert isinstance(model, WanSeparableDiffuser)
    theirs = stored(source / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = model.state_dict()
    for name, tensor in theirs.items():
        if name.startswith("blocks."):
            layer, rest = int(name.split(".")[1]), name.split(".", 2)[2]
            if layer < 4:
                assert torch.equal(ours[f"encoder.blocks.{layer}.{rest}"], tensor)
            place = {0: 0, 1: 1, NUM_LAYERS - 1: 2}.get(layer)
            if place is not None:
                assert torch.equal(ours[f"decoder.blocks.{place}.{rest}"], tensor)
        else:
            assert torch.equal(ours[f"decoder.{name}"], tensor)
            if not name.startswith(("proj_out", "scale_shift_table")):
                assert torch.equal(ours[f"encoder.{name}"], tensor)
    assert model.shape == SHAPE and model.config.block == BLOCK
    assert world.card.conditions.text_length == 8 and world.card.fps == 16
    assert schedule(world.sampling)[1] == pytest.approx(3 * 0.98 / (1 + 2 * 0.98))


def test_a_dense_world_is_the_source_and_comes_back_bit_by_bit(source, tmp_path):
    run = tmp_path / "run"
    arguments = ["--model", str(source), "--split", "dense", "--out", str(run)]
    sizes = ["--height", "32", "--width", "48", "--text-length", "8"]
    assert main(["convert", "wan", *arguments, *sizes]) == 0
    world = load_world(run)
    assert isinstance(world.model, WanDiffuser)
    clean, _, _, conditions, _ = wan_clips()
    expected = tiny_transformer()(
        clean.transpose(1, 2), torch.full((2,), 500.0), conditions.text, return_dict=False
    )[0].transpose(1, 2)
    with torch.no_grad():
        ours = world.model.bidirectional(clean, torch.full((2, 5), 0.5), conditions)
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=0)
    assert main(["export", "diffusers", str(run), "--out", str(tmp_path / "back")]) == 0
    name = "diffusion_pytorch_model.safetensors"
    assert_bit_equal(
        stored(tmp_path / "back/transformer" / name), stored(source / "transformer" / name)
    )
    loaded, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "back/transformer", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dict(loaded.config)["num_layers"] == NUM_LAYERS


def test_parts_of_a_moved_world_are_exported_from_beside_its_weights(source, tmp_path):
    run = convert_wan(
        ConvertWanConfig(model=str(source), out=str(tmp_path / "run"), split="dense", **SMALL)
    )
    moved = run.rename(tmp_path / "moved")
    for part in ("vae", "text_encoder", "tokenizer"):
        (moved / part).mkdir(exist_ok=True)
        (moved / part / "config.json").write_text('{"_class_name": "Ours"}')
    settings = json.loads((moved / "config.json").read_text())
    settings["autoencoder"]["source"] = str(run)
    (moved / "config.json").write_text(json.dumps(settings))
    export_diffusers(moved, str(tmp_path / "back"))
    for part in ("vae", "text_encoder", "tokenizer"):
        assert (tmp_path / "back" / part / "config.json").is_file()


def test_both_parts_of_a_separable_world_are_exported(source, tmp_path):
    run = convert_wan(
        ConvertWanConfig(model=str(source), out=str(tmp_path / "run"), split="4,2+1", **SMALL)
    )
    folders = export_diffusers(run, str(tmp_path / "back"))
    assert [folder.name for folder in folders] == ["encoder", "decoder"]
    ours = stored(run / WEIGHTS_FILE)
    for folder, num_layers in zip(folders, (4, 3), strict=True):
        loaded, report = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert len(loaded.blocks) == num_layers
        for name, tensor in loaded.state_dict().items():
            own = f"{folder.name}.{name}"
            assert torch.equal(tensor, ours[own if own in ours else f"decoder.{name}"]), own


@pytest.mark.parametrize("dtype", ["source", "bf16", "fp32"])
def test_types_of_numbers(dtype, tmp_path):
    # As diffusers stores bfloat16: norms, tables and the embedder of times in float32.
    state = tiny_transformer().state_dict()
    kept = ("norm", "scale_shift_table", "time_embedder")
    state = {
        name: tensor if any(word in name for word in kept) else tensor.bfloat16()
        for name, tensor in state.items()
    }
    folder = write_tiny_transformer(tmp_path / "source")
    shutil.rmtree(folder / "transformer")
    tiny_transformer().save_pretrained(folder / "transformer")
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    run = convert_wan(
        ConvertWanConfig(
            model=str(folder), out=str(tmp_path / "run"), split="dense", dtype=dtype, **SMALL
        )
    )
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype)
    for name, tensor in stored(run / WEIGHTS_FILE).items():
        assert tensor.dtype == (wanted or state[name].dtype)
        assert torch.equal(tensor.float(), state[name].to(tensor.dtype).float())
    model = load_world(run).model
    assert {weight.dtype for weight in model.parameters()} == {
        tensor.dtype for tensor in stored(run / WEIGHTS_FILE).values()
    }
    clean, noisy, time, conditions, _ = wan_clips()
    with torch.no_grad():
        state = model.begin(clean[:, :2], conditions)
        velocity = model.velocity(model.context(state, conditions), noisy[:, 0, 2], time[:, 0, 2])
        exact = load_world(run).model.float()
        state = exact.begin(clean[:, :2], conditions)
        expected = exact.velocity(exact.context(state, conditions), noisy[:, 0, 2], time[:, 0, 2])
    assert (velocity.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_files_are_read_and_written_in_pieces(source, tmp_path, monkeypatch):
    monkeypatch.setattr("scd.convert.wan.SHARD_BYTES", 30_000)
    run = convert_wan(
        ConvertWanConfig(model=str(source), out=str(tmp_path / "run"), split="4,2+1", **SMALL)
    )
    files = sorted(run.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 60_000 for file in files)
    assert not (run / WEIGHTS_FILE).exists() and not list(run.glob("*.part"))
    load_world(run)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the files"):
        load_world(run)


@pytest.mark.parametrize("wrapped", ["", "model.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("key", ["generator", "generator_ema", ""])
def test_causal_checkpoints_are_read_under_their_own_names(key, wrapped, tmp_path):
    ours = tiny_transformer(seed=3).state_dict()
    theirs = {}
    for name, tensor in ours.items():
        original = to_original(name)
        if "_fsdp" in wrapped and original.startswith("blocks."):
            block, number, rest = original.split(".", 2)
            original = f"{block}.{number}._fsdp_wrapped_module.{rest}"
        theirs[wrapped + original] = tensor
    other = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    file = tmp_path / "checkpoint.pt"
    content = {key: theirs} if key else theirs
    if key == "generator_ema":
        content["generator"] = other
    torch.save(content, file)
    run = convert_wan(
        ConvertWanConfig(
            model=str(file),
            out=str(tmp_path / "run"),
            split="dense",
            head_dim=BLOCK.head_dim,
            **SMALL,
        )
    )
    assert_bit_equal(stored(run / WEIGHTS_FILE), ours)
    world = load_world(run)
    assert world.model.config.block == BLOCK and world.model.config.num_layers == NUM_LAYERS
    assert world.sampling.solver == "renoise"
    times = schedule(world.sampling).tolist()
    assert times == pytest.approx([1, 0.9375, 0.833333, 0.625, 0])


def test_names_go_there_and_back():
    for name in tiny_transformer().state_dict():
        assert from_original(to_original(name)) == name
        assert from_original(name) == name
    with pytest.raises(ValueError, match="no weight of a Wan model"):
        to_original("blocks.0.attn3.to_q.weight")


def test_a_converted_world_streams(source, tmp_path):
    run = convert_wan(
        ConvertWanConfig(
            model=str(source), out=str(tmp_path / "run"), split="4,2+1", num_steps=2, **SMALL
        )
    )
    rollout = Rollout(load_world(run), seed=1)
    rollout.begin(None, Conditions(text=random_text(1)))
    draft = rollout.draft()
    latent = rollout.engine.denoise(draft.context, draft.noise, rollout.times)
    rollout.keep(draft, latent)
    assert latent.shape == (1, *SHAPE.shape) and torch.isfinite(latent).all()


def test_a_probes_proposal_is_a_split(tmp_path):
    path = tmp_path / "probe.json"

    def write(encoder, decoder):
        proposal = {"encoder_layers": encoder, "decoder_layers": decoder}
        path.write_text(json.dumps({"proposed_split": proposal}))
        return str(path)

    assert read_split(write(25, [1, 2, 3, 29, 30])) == (25, 3, 2)
    assert read_split(write(4, [5, 6])) == (4, 0, 2)
    assert read_split("25, 5+5") == (25, 5, 5) and read_split("dense") is None
    with pytest.raises(ValueError, match="the first and the last"):
        read_split(write(4, [1, 3, 6]))
    with pytest.raises(ValueError, match="must be like"):
        read_split("25")


def refused(source, out, words, *arguments):
    """The one line that is printed; nothing is written."""
    sizes = {"--height": "32", "--width": "48", "--text-length": "8", "--split": "4,2+1"}
    sizes |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    given = [word for pair in sizes.items() for word in pair]
    assert main(["convert", "wan", "--model", str(source), "--out", str(out), *given]) == 2
    printed = words.readouterr().err
    assert len(printed.splitlines()) == 1 and not out.exists()
    return printed


def test_bad_input_is_refused_before_any_weight_is_read(source, tmp_path, capsys, monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Weights, "get", read)
    out = tmp_path / "run"
    assert "has 6" in refused(source, out, capsys, "--split", "7,2+1")
    assert "has 6" in refused(source, out, capsys, "--split", "4,4+3")
    assert "must be like" in refused(source, out, capsys, "--split", "four")
    assert "multiples of 16" in refused(source, out, capsys, "--height", "40")
    assert "no effect on split=dense" in refused(
        source, out, capsys, "--split", "dense", "--join", "middle"
    )
    assert "there is no folder" in refused(tmp_path / "none", out, capsys)
    assert "config.json" in refused(_changed(source, tmp_path / "a", _no_config), out, capsys)
    assert "it holds FluxTransformer2DModel" in refused(
        _changed(source, tmp_path / "b", _class("FluxTransformer2DModel")), out, capsys
    )
    assert "text to video" in refused(
        _changed(source, tmp_path / "c", _setting("image_dim", 1280)), out, capsys
    )
    assert "lacks 1 of the files" in refused(
        _changed(source, tmp_path / "d", _no_shard), out, capsys
    )
    assert "another architecture" in refused(
        _changed(source, tmp_path / "e", _setting("ffn_dim", 44)), out, capsys
    )
    assert "not quantised" in refused(_changed(source, tmp_path / "f", _bytes), out, capsys)


def _changed(source, folder, change):
    shutil.copytree(source, folder)
    change(folder / "transformer")
    return folder


def _no_config(folder):
    (folder / CONFIG_FILE).unlink()


def _no_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _class(name):
    return _setting("_class_name", name)


def _setting(name, value):
    def change(folder):
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | {name: value}))

    return change


def _bytes(folder):
    file = next(file for file in folder.glob("*.safetensors"))
    state = {name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}
    save_file(state, file)


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    said = refused("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tmp_path / "run", capsys)
    assert "hf download" in said


def test_other_files_are_no_causal_checkpoints(tmp_path):
    file = tmp_path / "other.pt"
    torch.save({"generator": {"weight": torch.zeros(2)}}, file)
    settings = {"model": str(file), "out": str(tmp_path / "run"), "split": "dense"}
    with pytest.raises(ValueError, match="holds no Wan model"):
        convert_wan(ConvertWanConfig(**settings))
    with pytest.raises(ValueError, match="has no 'critic'"):
        convert_wan(ConvertWanConfig(key="critic", **settings))
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_wan(ConvertWanConfig(**settings))


def test_a_world_of_another_kind_is_not_exported(run, tmp_path):
    with pytest.raises(ValueError, match="no Wan world"):
        export_diffusers(run, str(tmp_path / "out"))
