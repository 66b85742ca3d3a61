"""What people name as weights of Wan: single files, Wan2.2, the layout of its release, shifts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scd.autoencoders.build import open_autoencoder
from scd.cli import main
from scd.data.latents import read_info
from scd.models.checkpoint import load_world
from scd.models.wan.source import open_source, to_original
from scd.models.weights import WEIGHTS_FILE
from tests.tiny_wan import BLOCK, tiny_transformer, write_tiny_transformer
from tests.tiny_wan_run import encode_with, words_of, write_clips
from tests.tiny_wan_vae import tiny_vae, write_tiny_parts

SIZES = ["--height", "32", "--width", "48", "--text-length", "8", "--split", "4,2+1"]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path):
    folder = write_tiny_transformer(tmp_path / "wan", max_shard_size="1GB")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def convert(model, out, *words):
    return main(["convert", "wan", "--model", str(model), "--out", str(out), *SIZES, *words])


def refused(model, out, capsys):
    """The one line that is printed; nothing is written."""
    before = sorted(out.parent.iterdir())
    assert convert(model, out, "--head-dim", str(BLOCK.head_dim)) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and sorted(out.parent.iterdir()) == before
    return said


def change(path, **values):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | values))


def test_a_file_of_safetensors_is_converted_as_one_of_torch(tmp_path):
    state = {to_original(name): value for name, value in tiny_transformer().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        out = tmp_path / f"out-{name}"
        assert convert(tmp_path / name, out, "--head-dim", str(BLOCK.head_dim)) == 0
    a, b = (load_file(tmp_path / f"out-{n}" / WEIGHTS_FILE) for n in ("a.safetensors", "b.pt"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_missing_and_unknown_weights_are_said_by_the_files_names(source, tmp_path, capsys):
    state = {to_original(name): value for name, value in tiny_transformer().state_dict().items()}
    wanting = {n: v for n, v in state.items() if n != "blocks.3.self_attn.norm_q.weight"}
    torch.save({f"model.{n}": v for n, v in wanting.items()}, tmp_path / "x.pt")
    said = refused(tmp_path / "x.pt", tmp_path / "out", capsys)
    assert "1 missing weights such as 'blocks.3.self_attn.norm_q.weight'" in said
    torch.save({f"model.{n}": v for n, v in state.items() if "patch" not in n}, tmp_path / "x.pt")
    assert "lacks the weight 'patch_embedding.weight'" in refused(
        tmp_path / "x.pt", tmp_path / "out", capsys
    )
    twice = state | {"blocks.0.attn1.to_q.bias": state["blocks.0.self_attn.q.bias"]}
    torch.save(twice, tmp_path / "x.pt")
    assert "name one weight" in refused(tmp_path / "x.pt", tmp_path / "out", capsys)
    path = source / "transformer" / FILE
    whole = load_file(path)
    save_file({n: v for n, v in whole.items() if n != "blocks.3.attn1.to_q.bias"}, path)
    assert "missing weights such as 'blocks.3.attn1.to_q.bias'" in refused(
        source, tmp_path / "out", capsys
    )
    save_file(whole | {"blocks.0.attn1.to_q.bias": torch.full_like(
        whole["blocks.0.attn1.to_q.bias"], float("nan"))}, path)  # fmt: skip
    assert "'blocks.0.attn1.to_q.bias' must be finite" in refused(source, tmp_path / "out", capsys)


def test_wan22_with_two_transformers_is_refused(source, tmp_path, capsys):
    change(
        source / "model_index.json",
        transformer_2=["diffusers", "WanTransformer3DModel"],
        boundary_ratio=0.875,
    )
    said = refused(source, tmp_path / "out", capsys)
    assert "two transformers" in said and "boundary_ratio 0.875" in said and "Wan2.1" in said
    change(source / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    assert convert(source, tmp_path / "single") == 0
    shutil.copytree(source / "transformer", source / "transformer_2")
    assert "two transformers" in refused(source, tmp_path / "out", capsys)
    name = tmp_path / "high_noise_model.pt"
    torch.save(tiny_transformer().state_dict(), name)
    assert "one for high noise" in refused(name, tmp_path / "out", capsys)


def test_wans_own_layout_is_named(tmp_path, capsys):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    save_file({"patch_embedding.weight": torch.ones(2)}, folder / FILE)
    (folder / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
    (folder / "Wan2.1_VAE.pth").write_bytes(b"PK")
    wanted = "you want the repository whose name ends in -Diffusers"
    assert wanted in refused(folder, tmp_path / "out", capsys)
    (folder / "config.json").unlink()
    assert wanted in refused(folder, tmp_path / "out", capsys)


def test_the_folders_shift_bends_the_steps(source, tmp_path, caplog):
    assert convert(source, tmp_path / "a") == 0
    assert load_world(tmp_path / "a").sampling.shift == 3
    assert "flow_shift 3" in caplog.text
    shutil.rmtree(source / "scheduler")
    assert convert(source, tmp_path / "b") == 0
    assert load_world(tmp_path / "b").sampling.shift == 5
    (source / "scheduler").mkdir()
    (source / "scheduler/scheduler_config.json").write_text('{"flow_shift": NaN}')
    with pytest.raises(ValueError, match="flow_shift must be above 0"):
        open_source(str(source))


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": 10**9},
        {"num_layers": 2.5},
        {"ffn_dim": "wide"},
        {"patch_size": 2},
        {"eps": -1},
        {"num_attention_heads": True},
    ],
)
def test_settings_out_of_bounds_are_refused(values, source, tmp_path, capsys):
    change(source / "transformer/config.json", **values)
    assert "config.json" in refused(source, tmp_path / "out", capsys)


def test_the_commands_of_the_page_go_one_after_the_other(tmp_path):
    """`scd convert wan`, `scd encode` with the world as both parts, `scd train wan-tf`."""
    source = write_tiny_transformer(write_tiny_parts(tmp_path / "wan"), num_layers=3)
    world, clips = str(tmp_path / "world"), write_clips(tmp_path / "clips")
    sizes = ["--height", "32", "--width", "32", "--text-length", "16", "--split", "2,1+1"]
    words = ["convert", "wan", "--model", str(source), "--out", world, "--window", "5"]
    assert main([*words, *sizes]) == 0
    latents = encode_with(world, clips, tmp_path / "latents")
    assert main(words_of(latents, world, tmp_path / "run", "--max-steps", "1")) == 0
    # A world that was moved with its parts inside is as good.
    assert main([*words[:4], "--copy-parts", "--out", str(tmp_path / "own"), *sizes]) == 0
    shutil.rmtree(source)
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    again = encode_with(str(moved), clips, tmp_path / "again")
    first, second = (read_info(Path(one)) for one in (latents, again))
    assert (first.fingerprint, first.text) == (second.fingerprint, second.text)


def test_an_autoencoder_that_lacks_a_weight_is_refused(tmp_path):
    folder = write_tiny_parts(tmp_path / "parts")
    path = folder / "vae" / FILE
    whole = load_file(path)
    save_file({n: v for n, v in whole.items() if n != "decoder.conv_in.bias"}, path)
    with pytest.raises(ValueError, match="1 missing weights such as 'decoder.conv_in.bias'"):
        open_autoencoder(folder)
    path.unlink()
    torch.save(whole, folder / "vae/diffusion_pytorch_model.bin")
    frames = torch.rand(1, 1, 3, 16, 16) * 2 - 1
    again = open_autoencoder(folder).encode(frames)
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    half = {name: value.half() for name, value in whole.items()}
    save_file(half, folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    torch.testing.assert_close(open_autoencoder(folder).encode(frames), again, atol=2e-2, rtol=0)
