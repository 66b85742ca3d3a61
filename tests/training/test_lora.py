"""LoRA of Wan models: trained, kept, continued, merged, read by diffusers, refused elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from scd.cli import main
from scd.common.runlog import read_log
from scd.models.checkpoint import load_auxiliary, load_world, resolve
from scd.models.lora import LORA_FILE, add_lora, merged, without_lora
from scd.training.presets import WAN_DMD
from tests.tiny_wan import (
    TEXT,
    tiny_wan,
    tiny_wan_separable,
    wan_clips,
    write_tiny_transformer,
)
from tests.tiny_wan_run import encode_with, words_of, write_clips, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, str, str, str]:
    """Wan2.1 on disk; of it a separable world, a dense one, and latents with prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        wan, world = write_world(tmp_path_factory.mktemp("made"))
        dense = str(tmp_path_factory.mktemp("dense") / "world")
        assert main(convert_words(wan, dense)) == 0
        clips = write_clips(tmp_path_factory.mktemp("clips") / "all")
        latents = encode_with(world, clips, tmp_path_factory.mktemp("latents") / "all")
        yield wan, world, dense, latents


def convert_words(wan, out, *more):
    words = ["convert", "wan", "--model", wan, "--split", "dense", "--out", str(out)]
    words += ["--height", "32", "--width", "32", "--text-length", "16", "--window", "5"]
    return [*words, *more]


def stirred(model):
    """Give the halves of additions that begin at zero other values."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def newest(run: Path) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    folder = resolve(run)
    files = {str(one.relative_to(folder)): one for one in folder.rglob("*") if one.is_file()}
    contents = {name: one.read_bytes() for name, one in files.items()}
    progress = json.loads(contents.pop("progress.json"))
    progress.pop("elapsed_s")
    return contents | {"progress": json.dumps(progress).encode()}


@pytest.mark.parametrize("make", [tiny_wan, tiny_wan_separable])
@torch.no_grad()
def test_additions_change_nothing_at_first_and_can_be_merged_or_left_off(make):
    plain, model = make(), make()
    clean, noisy, time, conditions, _ = wan_clips(num_frames=3)
    before = plain(clean, noisy, time, conditions)
    add_lora(model, 3, seed=0)
    torch.testing.assert_close(model(clean, noisy, time, conditions), before)
    stirred(model)
    changed = model(clean, noisy, time, conditions)
    assert (changed - before).abs().max() > 1e-2
    with without_lora(model):
        torch.testing.assert_close(model(clean, noisy, time, conditions), before)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(clean, noisy, time, conditions), changed, rtol=1e-4, atol=1e-5)


def test_train_go_on_bit_for_bit_and_stream_what_was_merged(made, tmp_path):
    _, world, _, latents = made
    changes = ["--lora", "2", "--optim.lr", "1e-2", "--sample-every", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words_of(latents, world, whole, *changes)) == 0
    part = words_of(latents, world, parts, *changes, "--save-every", "1")
    for _ in range(4):
        assert main([*part, "--time-limit-s", "0.001"]) == 0
    assert newest(parts) == newest(whole)
    base, found = load_world(world).model.state_dict(), load_world(whole).model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {
        name
        for name in base
        if name.endswith("weight") and ".blocks." in name and (".to_" in name or ".net." in name)
    }
    ranks = [
        torch.linalg.matrix_rank((found[name] - base[name]).float(), rtol=1e-3) for name in changed
    ]
    assert max(ranks) == 2
    raw = load_world(whole, "raw").model.state_dict()
    assert {name for name in base if not torch.equal(base[name], raw[name])} == changed
    assert any(not torch.equal(raw[name], found[name]) for name in changed)
    (start,) = read_log(whole, "start")
    lora = load_file(resolve(whole) / "lora/encoder" / LORA_FILE)
    assert start["moving_parameters"] < 0.5 * start["parameters"] and lora
    out = tmp_path / "video"
    words = ["sample", str(whole), "--prompt", "the red dog runs", "--seconds", "0.3"]
    assert main([*words, "--out", str(out), "--precision", "fp32"]) == 0


def velocity_of(model):
    generator = torch.Generator().manual_seed(5)
    frames = torch.randn(1, 16, 3, 4, 4, generator=generator)
    text = torch.randn(1, 16, TEXT.text_dim, generator=generator)
    with torch.no_grad():
        return model(
            hidden_states=frames, timestep=torch.tensor([700.0]), encoder_hidden_states=text
        ).sample


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_diffusers_reads_the_additions_onto_the_base(made, tmp_path, kind):
    """Its own class, with the file, is the merged world that was exported."""
    _, world, dense, latents = made
    base = dense if kind == "dense" else world
    run = tmp_path / "run"
    changes = ["--lora", "2", "--optim.lr", "1e-2", "--max-steps", "2"]
    assert main(words_of(latents, base, run, *changes)) == 0
    for number, place in enumerate((base, run)):
        words = ["export", "diffusers", str(place), "--out", str(tmp_path / f"back{number}")]
        assert main(words) == 0
    for part in ("transformer",) if kind == "dense" else ("encoder", "decoder"):
        plain, whole = (
            WanTransformer3DModel.from_pretrained(tmp_path / f"back{number}" / part).eval()
            for number in range(2)
        )
        before = velocity_of(plain)
        folder = resolve(run) / "lora" / ("" if kind == "dense" else part)
        plain.load_lora_adapter(str(folder), weight_name=LORA_FILE)
        after = velocity_of(plain)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, velocity_of(whole), rtol=1e-3, atol=1e-4)


def test_a_file_is_merged_at_conversion(made, tmp_path):
    """In the names of diffusers and of others: the same world as the training's own."""
    wan, _, dense, latents = made
    run = tmp_path / "run"
    changes = ["--lora", "2", "--optim.lr", "1e-2", "--max-steps", "2"]
    assert main(words_of(latents, dense, run, *changes)) == 0
    folder = resolve(run) / "lora"
    theirs = {}
    for name, value in load_file(folder / LORA_FILE).items():
        bare = name.removeprefix("transformer.")
        layer, _, half = bare.removesuffix(".weight").rpartition(".")
        layer = layer.replace("attn1.to_", "self_attn.").replace("attn2.to_", "cross_attn.")
        layer = layer.replace("out.0", "o").replace("net.0.proj", "0").replace("net.2", "2")
        kohya = {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
        theirs[f"diffusion_model.{layer}.{kohya}.weight"] = value
        theirs[f"diffusion_model.{layer}.alpha"] = torch.tensor(2.0)
    save_file(theirs, tmp_path / "kohya.safetensors")
    expected = load_world(run).model.state_dict()
    for number, place in enumerate((folder, tmp_path / "kohya.safetensors")):
        out = tmp_path / f"merged{number}"
        assert main(convert_words(wan, out, "--lora", str(place))) == 0
        found = load_world(out).model.state_dict()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_a_critic_that_shares_the_teachers_weights(made, tmp_path):
    """Its additions move, the teacher stays; kept are the additions, from which it goes on bit for
    bit; and the first update of the student is that of a critic with weights of its own."""
    wan, world, _, _ = made
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue ball\nsnow at night\n")
    words = ["distill", "wan-dmd", world, "--prompts", str(prompts), "--teacher", wan]
    words += ["--num-frames", "2", "--device", "cpu", "--precision", "fp32", "--sample-every", "0"]
    words += ["--num-accumulation", "1", "--objective.num-critic-updates", "1"]
    words += ["--objective.min-spread", "0", "--max-steps", "2"]
    words += ["--embedded", str(tmp_path / "embedded")]
    small = [*words, "--objective.critic-lora", "2", "--objective.critic.lr", "1e-2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*small, "--out", str(whole)]) == 0
    assert main([*small, "--out", str(parts), "--max-steps", "1"]) == 0
    assert main([*small, "--out", str(parts)]) == 0
    assert newest(parts) == newest(whole)
    kept = load_auxiliary(resolve(whole))["critic"]["weights"]
    assert all(".lora_" in name for name in kept)
    assert all(one.any() for name, one in kept.items() if "lora_B" in name)
    # Additions begin without effect: the first loss of the critic is that of the teacher's weights.
    assert main([*words, "--out", str(tmp_path / "own"), "--max-steps", "1"]) == 0
    first, own = (read_log(run, "step")[0] for run in (whole, tmp_path / "own"))
    assert first["critic_loss"] == pytest.approx(own["critic_loss"], rel=1e-5)
    for change in ({"method": "sid"}, {"critic_model": "a"}):
        with pytest.raises(ValueError, match="needs method 'dmd' and no critic_model"):
            replace(WAN_DMD.objective, critic_lora=2, **change)


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    wan, world, dense, latents = made
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(words_of(latents, dense, run, "--lora", "2", "--max-steps", "1")) == 0
    folder = resolve(run) / "lora"

    def refused(*words):
        assert main([str(word) for word in words]) == 2 and not out.exists()
        return capsys.readouterr().err

    other = write_tiny_transformer(tmp_path / "other", num_layers=2, ffn_dim=24)
    said = refused(*convert_words(str(other), out, "--lora", str(folder)))
    assert "of another base than" in said and "ffn_dim 40, not 24; num_layers 3, not 2" in said
    # A file that does not say its base is known by its shapes.
    file = tmp_path / "bare.safetensors"
    tensors = load_file(folder / LORA_FILE)
    save_file(tensors, file)
    said = refused(*convert_words(str(other), out, "--lora", str(file)))
    assert "ffn_dim 40, not 24; num_layers 3, not 2" in said
    save_file({"transformer.blocks.0.norm1.diff": torch.zeros(2)}, file)
    assert "needed additions to the linear maps" in refused(
        *convert_words(wan, out, "--lora", str(file))
    )
    save_file(
        {name: one for name, one in tensors.items() if "blocks.0.attn1.to_q.lora_A" not in name},
        file,
    )
    assert "lacks a half: ['up']" in refused(*convert_words(wan, out, "--lora", str(file)))
    assert "needed a file of LoRA" in refused(
        *convert_words(wan, out, "--lora", str(tmp_path / "no"))
    )
    toy = ["train", "toy", "--lora", "2", "--out", out]
    assert "lora is for Wan models" in refused(*toy)


def test_without_peft_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install -c constraints.txt -e ".\[lora\]"'):
        add_lora(tiny_wan(1), 2, seed=0)


def test_weights_of_actions_move_beside_additions(tmp_path, monkeypatch):
    """No published model has them, so that low rank would leave them without effect."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clips = write_clips(tmp_path / "clips", num_actions=3)
    _, world = write_world(tmp_path / "made", "--actions", clips)
    latents = encode_with(world, clips, tmp_path / "latents")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = ["--lora", "2", "--optim.lr", "1e-2", "--save-every", "1"]
    assert main(words_of(latents, world, whole, *changes, "--max-steps", "2")) == 0
    assert main(words_of(latents, world, parts, *changes, "--max-steps", "1")) == 0
    assert main(words_of(latents, world, parts, *changes, "--max-steps", "2")) == 0
    assert newest(parts) == newest(whole)
    before, after = load_world(world).model.state_dict(), load_world(whole).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("action_embedder.pool" in name for name in moved)
    assert not any("patch_embedding" in name or "time_proj" in name for name in moved)
