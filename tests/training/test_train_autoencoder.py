"""Training of an autoencoder: its losses by hand, its two parts, exact resume, the way from clips
to a world on its latents, and what it refuses."""

import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from scd.autoencoders.build import open_autoencoder
from scd.autoencoders.trained import decode_clips, encode_clips
from scd.autoencoders.wan import WanAutoencoder
from scd.cli import main
from scd.common.runlog import read_log
from scd.common.signals import StopRequest
from scd.data.clip import Batch
from scd.data.latents import LatentSource, read_info
from scd.data.loader import Loader
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.record import record
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec
from scd.data.toy import ToyRecording
from scd.evaluation.lpips import LAYERS
from scd.models.checkpoint import load_world
from scd.models.config import BlockConfig, DenseConfig, FrameShape
from scd.objectives import reconstruct
from scd.objectives.reconstruct import (
    PatchDiscriminator,
    Reconstruct,
    adversarial_loss,
    discriminator_loss,
    edge_distance,
    pyramid_distance,
    reconstruction_loss,
)
from scd.optim.config import OptimConfig
from scd.preprocessing.encode import EncodeConfig, encode
from scd.streaming.rollout import Rollout
from scd.training import autoencoder as training
from scd.training.autoencoder import build_network, train_autoencoder
from scd.training.config import TrainAutoencoderConfig
from scd.training.fit import fit_to_data, open_loader
from scd.training.folder import find_checkpoint
from scd.training.presets import preset
from scd.training.world import train
from tests.tiny_wan_vae import tiny_vae

NUM_MEASURED = 64


@pytest.fixture(scope="module", autouse=True)
def fewer_measured_frames():
    """Every checkpoint measures the scale of the latents: on fewer frames, that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "MEASURED_FRAMES", NUM_MEASURED)
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    """Five train, one val and one test episode of the toy world."""
    out = tmp_path_factory.mktemp("toy") / "videos"
    shares = {"val_fraction": 0.2, "test_fraction": 0.1}
    return str(record(ToyRecording(out=str(out), episodes=7, frames=18, workers=1, **shares)))


def settings(videos, out, **changes) -> TrainAutoencoderConfig:
    given = TrainAutoencoderConfig(
        data=videos,
        out=str(out),
        network="small-8",
        reconstruction_steps=2,
        adversarial_steps=2,
        batch_size=2,
        num_frames=2,
        log_every=1,
        num_validation_clips=2,
        device="cpu",
        num_loader_workers=1,
    )
    return replace(given, **changes)


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """Two steps of each part, with the checkpoint of each step."""
    out = tmp_path_factory.mktemp("trained") / "ae"
    train_autoencoder(settings(videos, out, save_every=1, keep_checkpoints=9, validate_every=2))
    return out


def weights(folder, name="raw") -> dict[str, torch.Tensor]:
    file = {"raw": "raw.safetensors", "averaged": "diffusion_pytorch_model.safetensors"}[name]
    return load_file(folder / file)


def pictures(f=2, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(f, 3, size, size, generator=generator) * 2 - 1


def test_the_pyramid_is_the_whole_picture():
    one = pictures(size=32)
    bands = reconstruct._bands(one)
    assert [band.shape[-1] for band in bands] == [32, 16, 8]
    whole = bands[-1]
    for band in reversed(bands[:-1]):
        size = band.shape[-2:]
        whole = band + torch.nn.functional.interpolate(whole, size=size, mode="bilinear")
    torch.testing.assert_close(whole, one)


def test_the_pyramid_sees_what_is_lost():
    one = open_source("toy:32", "train").read(0, 0, 2).frames
    blurred = reconstruct._blurred(one)
    same, near = pyramid_distance(one, one), pyramid_distance(blurred, one)
    assert same.shape == (2,) and same.max() <= 0.0011 and near.min() > 0.05
    torch.testing.assert_close(near, pyramid_distance(one, blurred))
    # Contrast counts by its surroundings: the same fault is worse in a flat picture.
    fault = torch.zeros(1, 3, 32, 32)
    fault[..., 16, 16] = 0.2
    flat, rough = torch.zeros(1, 3, 32, 32), pictures(1)
    assert pyramid_distance(flat + fault, flat) > 2 * pyramid_distance(rough + fault, rough)
    made = blurred.clone().requires_grad_()
    pyramid_distance(made, one).sum().backward()
    assert made.grad is not None and torch.isfinite(made.grad).all() and made.grad.any()


def test_losses_by_hand():
    made, true = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    loss, logs = reconstruction_loss(made, true, lambda a, b: (a - b).square().mean((1, 2, 3)), 2.0)
    assert (loss.item(), logs["pixels"].item(), logs["perceptual"].item()) == (1.0, 0.5, 0.25)
    # A judge that says the mean of a picture.
    loss, _ = discriminator_loss(lambda pictures: pictures.mean((1, 2, 3)), made, true)
    assert loss.item() == pytest.approx((0.5 + 1.0) / 2)
    # One pixel is off by 0.5: of 12 differences across, and of 12 down, it has two each (or one at
    # the side), in each of three colours.
    off = true.clone()
    off[..., 1, 0] += 0.5
    assert edge_distance(off, true).item() == pytest.approx((1 / 12 + 2 / 12) * 0.5 / 2)
    # In cells of 2 pixels its one difference down to row 2 lies across a border.
    assert edge_distance(off, true, 2, 3.0).item() == pytest.approx((1 / 12 + 4 / 12) * 0.5 / 2)
    last = torch.tensor(3.0, requires_grad=True)
    picture = last * true
    reconstruction = 4 * (picture - true).mean()  # slope 2 at the last layer
    fooled, logs = adversarial_loss(lambda p: 10 * p.mean(), picture, reconstruction, last, 0.5)
    # The judge's slope there is 5 away from it, so 2 / 5 makes the pulls equal.
    assert logs["adaptive"].item() == pytest.approx(0.4, rel=1e-3)
    assert fooled.item() == pytest.approx(0.5 * 0.4 * -15.0, rel=1e-3)
    assert torch.autograd.grad(fooled, last)[0].item() == pytest.approx(-1.0, rel=1e-3)


def test_a_logit_of_the_judge_sees_a_patch_of_70_pixels():
    judge = PatchDiscriminator(width=4).eval()
    seen = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = judge(seen)
    assert logits.shape == (1, 14, 14)
    logits[0, 7, 7].backward()
    assert seen.grad is not None
    rows = seen.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    smallest = reconstruct.SMALLEST_PICTURE
    assert judge(torch.zeros(1, 3, smallest, smallest)).numel() == 1


def test_interrupted_training_repeats_the_uninterrupted_one(videos, trained, tmp_path):
    out = tmp_path / "ae"
    config = settings(videos, out)
    # Over the switch, and within the second part.
    for steps in (0, 1, 2):
        train_autoencoder(replace(config, adversarial_steps=steps))
    for name in ("raw", "averaged"):
        once, parts = weights(trained / "step_000004", name), weights(out / "step_000004", name)
        assert once.keys() == parts.keys()
        assert all(torch.equal(once[key], parts[key]) for key in once)
    states = [
        torch.load(folder / "step_000004/auxiliary.pt", weights_only=True)["discriminator"][
            "weights"
        ]
        for folder in (trained, out)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [event["step"] for event in read_log(out, "resume")] == [2, 3]


def test_training_by_muon_goes_on_bit_for_bit(videos, tmp_path):
    optim = OptimConfig(optimizer="muon", decoder_lr_ratio=1.0, warmup_steps=0)
    one, other = (settings(videos, tmp_path / name, optim=optim) for name in ("one", "other"))
    train_autoencoder(one)
    for steps in (0, 2):
        train_autoencoder(replace(other, adversarial_steps=steps))
    once, parts = (weights(tmp_path / name / "step_000004") for name in ("one", "other"))
    assert all(torch.equal(once[key], parts[key]) for key in once)


def test_the_second_part_leaves_the_encoder_where_the_average_was(trained):
    steps = [trained / f"step_{number:06d}" for number in (1, 2, 3, 4)]
    for name in weights(steps[1], "averaged"):
        before = [weights(step)[name] for step in steps]
        averages = [weights(step, "averaged")[name] for step in steps]
        if name.startswith("encoder."):
            assert torch.equal(before[2], averages[1]) and torch.equal(before[3], averages[1])
            assert torch.equal(averages[2], averages[1]) and torch.equal(averages[3], averages[1])
    for moved, (one, other) in (
        ("decoder.conv_out.conv.weight", steps[2:]),
        ("encoder.conv_out.weight", steps[:2]),
    ):
        assert not torch.equal(weights(one)[moved], weights(other)[moved])
    judged = [event for event in read_log(trained, "step") if "discriminator" in event]
    assert [event["step"] for event in judged] == [3, 4]


def test_a_finished_autoencoder_gets_a_decoder_that_knows_edges_and_noise(videos, tmp_path):
    later = {"adversarial_weight": 0.0, "edge_weight": 2.0, "border_weight": 3.0}
    later |= {"latent_noise": 0.3}
    one, other = settings(videos, tmp_path / "one", adversarial_steps=0), tmp_path / "other"
    train_autoencoder(one)
    train_autoencoder(replace(one, adversarial_steps=2, **later))
    train_autoencoder(replace(one, out=str(other), adversarial_steps=2, **later))
    first, steps = (
        tmp_path / "one/step_000002",
        [tmp_path / "one/step_000004", other / "step_000004"],
    )
    for name, before in weights(first, "averaged").items():
        once, again = (weights(step, "averaged")[name] for step in steps)
        assert torch.equal(once, again)
        assert not name.startswith("encoder.") or torch.equal(once, before)
    moved = "decoder.conv_out.conv.weight"
    assert not torch.equal(weights(first)[moved], weights(steps[0])[moved])
    # Worlds on its latents go on: they are the same, at the same scale.
    scales = [(folder / "statistics.json").read_text() for folder in (first, *steps)]
    assert scales[0] == scales[1] == scales[2]
    found = read_log(other, "step")
    assert [event["step"] for event in found if "edges" in event] == [3, 4]
    assert not any("discriminator" in event or "adversarial" in event for event in found)


def test_the_decoder_of_another_autoencoder_learns_on(videos, trained, tmp_path):
    start = shutil.copytree(trained / "step_000004", tmp_path / "start")
    # As a world's, whose scale was once measured of other data.
    scale = json.loads((start / "statistics.json").read_text())
    scale["std"] = [2 * one for one in scale["std"]]
    (start / "statistics.json").write_text(json.dumps(scale))
    config = settings(videos, tmp_path / "whole", initial=str(start), reconstruction_steps=0)
    config = replace(config, adversarial_weight=0.0, edge_weight=2.0, adversarial_steps=2)
    train_autoencoder(config)
    part = replace(config, out=str(tmp_path / "part"))
    train_autoencoder(replace(part, adversarial_steps=1))
    shutil.rmtree(start)
    # It goes on without what it started from, to the same bit.
    train_autoencoder(part)
    steps = [
        trained / "step_000004",
        *(tmp_path / one / "step_000002" for one in ("whole", "part")),
    ]
    moved = 0
    for name, before in weights(steps[0], "averaged").items():
        once, again = (weights(step, "averaged")[name] for step in steps[1:])
        assert torch.equal(once, again)
        assert not name.startswith("encoder.") or torch.equal(once, before)
        moved += not torch.equal(once, before)
    assert moved > 10
    for step in steps[1:]:
        assert json.loads((step / "statistics.json").read_text()) == scale


def test_all_of_another_autoencoder_learns_on(videos, trained, tmp_path):
    out = tmp_path / "on"
    config = settings(videos, out, adversarial_steps=0, initial=str(trained), seed=7, save_every=1)
    train_autoencoder(config)
    start, step = weights(trained / "step_000004", "averaged"), weights(out / "step_000001")
    name = "encoder.conv_out.weight"
    # One step of AdamW moves each weight by the rate; another seed's lie elsewhere.
    moved = (step[name] - start[name]).abs().max()
    assert 0 < moved < 1.1 * config.optim.lr
    fresh = build_network(config, open_source(videos, "train")).state_dict()[name]
    assert (fresh - start[name]).abs().max() > 100 * moved
    scales = [
        (one / "statistics.json").read_text()
        for one in (trained / "step_000004", out / "step_000002")
    ]
    assert scales[0] != scales[1]


def test_what_is_no_start_is_refused(videos, trained, tmp_path):
    for initial, network, message in (
        (str(trained), "small-16", "of another network than the one that is to learn on"),
        ("scd/worlds/doom", "small-8", "a world of pixels: it has no autoencoder to start from"),
    ):
        with pytest.raises(ValueError, match=message):
            train_autoencoder(settings(videos, tmp_path / "ae", network=network, initial=initial))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_autoencoder(settings(videos, tmp_path / "ae", initial=str(tmp_path / "nowhere")))
    assert not (tmp_path / "ae").exists()


def test_the_decoder_hears_no_encoder_and_as_much_noise_as_asked(videos):
    batch = Batch.of([open_source(videos, "train").read(0, 0, 4)])
    true = batch.frames.flatten(0, 1)
    torch.manual_seed(0)
    model = build_network(settings(videos, ""), open_source(videos, "train"))
    objective = Reconstruct(
        distance=pyramid_distance,
        perceptual_weight=0.0,
        adversarial_weight=0.0,
        edge_weight=0.0,
        border_weight=1.0,
        cell_size=8,
        latent_noise=0.0,
        discriminator=PatchDiscriminator(width=4),
        autocast=nullcontext,
        decoder_alone=True,
    )

    def loss_and_latents(**changes):
        seen = []
        hook = model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        generator = torch.Generator().manual_seed(3)
        loss, _ = replace(objective, **changes).loss(model, batch, generator)
        hook.remove()
        return loss, seen[0]

    plain, exact = loss_and_latents()
    torch.testing.assert_close(plain, (model(true).sample - true).abs().mean())
    edges, _ = loss_and_latents(edge_weight=2.0)
    made = model(true).sample
    torch.testing.assert_close(edges - plain, 2 * edge_distance(made, true))
    _, noisy = loss_and_latents(latent_noise=0.5)
    spread = exact.std((0, 2, 3))
    torch.testing.assert_close((noisy - exact).std((0, 2, 3)) / spread, torch.full((32,), 0.5),
                               atol=0.15, rtol=0)  # fmt: skip
    edges.backward()
    assert all(one.grad is None for one in model.encoder.parameters())
    assert all(one.grad is not None for one in model.decoder.parameters())


def test_the_folder_is_an_autoencoder_at_unit_scale(videos, trained):
    autoencoder = open_autoencoder(str(trained))
    loader = Loader(open_source(videos, "train"), 2, 2, seed=0)
    latents = torch.cat(
        [autoencoder.encode(loader.batch(n).frames) for n in range(NUM_MEASURED // 4)]
    )
    latents = latents.movedim(2, 0).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(32), atol=5e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(32), atol=5e-3, rtol=0)
    scale = json.loads((trained / "step_000004/config.json").read_text())["scaling_factor"]
    raw = autoencoder.encode_raw(loader.batch(0).frames)
    assert 0.5 < raw.square().mean().sqrt().item() * scale < 2
    result = json.loads((trained / "held_out.json").read_text())
    assert result["num_clips"] == 2 and result["held_out"]["psnr"]["mean"] > 0
    assert "ssim" in result["held_out"] and "hardware" in result
    assert (trained / "samples/step_000004.png").is_file()


def test_it_learns(videos, tmp_path):
    found = []
    for steps in (1, 25):
        config = settings(videos, tmp_path / str(steps), reconstruction_steps=steps)
        optim = replace(config.optim, lr=2e-3)
        config = replace(config, adversarial_steps=0, optim=optim, ema_decay=0.5, log_every=25)
        found.append(train_autoencoder(config)["psnr"].mean)
    assert found[1] > found[0] + 3, found


def test_a_time_limit_saves_and_the_command_goes_on(videos, tmp_path):
    config = settings(videos, tmp_path / "ae", time_limit_s=1e-6)
    assert StopRequest(1e-6).reason
    train_autoencoder(config)
    assert find_checkpoint(config) == tmp_path / "ae/step_000001"
    assert read_log(tmp_path / "ae", "end")[0]["reason"].startswith("the time limit")
    train_autoencoder(replace(config, time_limit_s=0.0))
    assert read_log(tmp_path / "ae", "resume")[0]["step"] == 1
    assert read_log(tmp_path / "ae", "end")[-1]["step"] == 4


def test_from_clips_to_a_world_on_its_latents(videos, trained, tmp_path):
    latents = tmp_path / "latents"
    words = ["encode", videos, "--autoencoder", str(trained), "--out", str(latents)]
    assert main([*words, "--stored", "fp32", "--device", "cpu"]) == 0
    info, source = read_info(latents), LatentSource(latents, "train")
    assert (info.shape, info.autoencoder["network"]) == ((32, 4, 4), "AutoencoderDC")
    frames = open_source(videos, "train").read(1, 3, 5).frames
    autoencoder = open_autoencoder(str(trained))
    torch.testing.assert_close(
        source.read(1, 3, 5).frames, autoencoder.encode(frames[None])[0], atol=1e-4, rtol=1e-4
    )
    base = preset("toy")
    model = DenseConfig(
        shape=FrameShape(channels=32, height=4, width=4, patch_size=2),
        block=BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6)),
        num_layers=1,
    )
    config = replace(
        base,
        data=str(latents),
        out=str(tmp_path / "run"),
        model=model,
        objective=replace(base.objective, context_noise=0.0),
        sampling=replace(base.sampling, num_steps=2),
        precision="fp32",
        max_steps=1,
        batch_size=2,
        num_frames=6,
        num_validation_clips=2,
        device="cpu",
    )
    world = load_world(train(fit_to_data(config)))
    assert (tmp_path / "run/samples/step_000001.png").is_file()
    rollout = Rollout(world, seed=0)
    given = Batch.of([open_source(videos, "train").read(1, 3, 2)])
    rollout.begin(given.frames, given.conditions)
    frame = rollout.step(torch.tensor([1]))
    assert frame.shape == (1, 3, 32, 32) and frame.abs().max() <= 1
    out = tmp_path / "evaluation.json"
    words = ["evaluate", str(tmp_path / "run"), "--data", videos, "--out", str(out)]
    flags = ["--context", "2", "--horizon", "2", "--num-clips", "2", "--device", "cpu"]
    assert main([*words, *flags]) == 0 and out.is_file()


def test_an_autoencoder_of_video_learns_alike(videos, tmp_path):
    """Over the switch to the second part, on bit for bit; a folder of Wan's class at unit scale."""
    config = settings(videos, tmp_path / "whole", network="small-wan", num_frames=5)
    config = replace(config, optim=replace(config.optim, optimizer="muon"), latent_noise=0.1)
    train_autoencoder(config)
    parts = replace(config, out=str(tmp_path / "parts"), keep_checkpoints=9)
    for steps in (0, 1, 2):
        train_autoencoder(replace(parts, adversarial_steps=steps, latent_noise=0.1 * (steps > 0)))
    steps = [tmp_path / name / "step_000004" for name in ("whole", "parts")]
    for name in ("raw", "averaged"):
        once, again = (weights(step, name) for step in steps)
        assert once.keys() == again.keys()
        assert all(torch.equal(once[key], again[key]) for key in once)
    encoder = [weights(tmp_path / "parts" / f"step_00000{n}", "averaged") for n in (2, 4)]
    for name in encoder[0]:
        same = torch.equal(encoder[0][name], encoder[1][name])
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    autoencoder = open_autoencoder(str(tmp_path / "whole"))
    assert isinstance(autoencoder, WanAutoencoder) and autoencoder.config.is_video
    loader = Loader(open_source(videos, "train"), 2, 5, seed=0)
    clips = [loader.batch(n).frames for n in range(-(-NUM_MEASURED // 10))]
    latents = torch.cat([autoencoder.encode(frames) for frames in clips])
    latents = latents.movedim(2, 0).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=5e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(16), atol=5e-3, rtol=0)
    # What it learns on is what diffusers' own class makes of clips, and the streams here.
    network, (frames, *_) = autoencoder.network, clips
    raw = encode_clips(network, frames)
    video = frames.transpose(1, 2)
    mean = network.encode(video).latent_dist.mode()
    torch.testing.assert_close(raw, mean.transpose(1, 2), atol=1e-5, rtol=1e-4)
    made, shown = decode_clips(network, raw), network.decode(mean).sample.transpose(1, 2)
    torch.testing.assert_close(made.clamp(-1, 1), shown, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        autoencoder.decode(autoencoder.encode(frames)), shown, atol=1e-4, rtol=1e-3
    )
    raw = encode_clips(network.requires_grad_(), frames)
    assert decode_clips(network, 100 * raw).abs().max() > 1 and raw.requires_grad
    with pytest.raises(ValueError, match="needed num_frames 5, 9, 13, ..., got 4"):
        settings(videos, "", network="small-wan", num_frames=4)


def test_latents_of_another_autoencoder_are_noticed(videos, trained, tmp_path, capsys):
    copy = tmp_path / "ae"
    copy.mkdir()
    for step in ("step_000001", "step_000004"):
        (copy / step).symlink_to(trained / step)
    (copy / "last").write_text("step_000004\n")
    latents = tmp_path / "latents"
    given = EncodeConfig(data=videos, autoencoder=str(copy), out=str(latents), device="cpu")
    encode(given)
    shape = FrameShape(channels=32, height=4, width=4, patch_size=2)
    base = replace(preset("toy"), data=str(latents), num_frames=6)
    block = BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6))
    model = DenseConfig(shape=shape, block=block, num_layers=1)
    config = fit_to_data(replace(base, model=model))
    assert open_loader(config, 0, 1).source.num_episodes == 5
    (copy / "last").write_text("step_000001\n")
    with pytest.raises(ValueError, match="an autoencoder with other weights"):
        open_loader(config, 0, 1)
    words = ["encode", videos, "--autoencoder", str(copy), "--out", str(latents)]
    assert main([*words, "--device", "cpu"]) == 2
    assert "holds another encoding" in capsys.readouterr().err
    measured = replace(given, statistics="measured", out=str(tmp_path / "measured"))
    encode(measured)
    assert read_info(tmp_path / "measured").fingerprint != read_info(latents).fingerprint
    tiny_vae().save_pretrained(tmp_path / "wan/vae")
    with pytest.raises(ValueError, match="wan is no autoencoder of pictures"):
        encode(replace(measured, autoencoder=str(tmp_path / "wan")))


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random weights under the names of AlexNet and of LPIPS's heads, and their hashes."""
    generator = torch.Generator().manual_seed(0)
    alexnet, heads = {}, {}
    for index, (number, given, made, kernel, *_) in enumerate(LAYERS):
        shape = (made, given, kernel, kernel)
        spread = (2 / (given * kernel**2)) ** 0.5
        alexnet[f"features.{number}.weight"] = spread * torch.randn(shape, generator=generator)
        alexnet[f"features.{number}.bias"] = torch.zeros(made)
        heads[f"lin{index}.model.1.weight"] = torch.rand(1, made, 1, 1, generator=generator)
    folder = tmp_path_factory.mktemp("lpips")
    found = {}
    for name, state in (("alexnet", alexnet), ("lpips_heads", heads)):
        torch.save(state, folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        found |= {name: str(folder / name), f"{name}_sha256": digest}
    return found


def test_lpips_takes_the_place_of_the_pyramid_where_it_is_given(videos, lpips_files, tmp_path):
    config = settings(videos, tmp_path / "ae", adversarial_steps=0, **lpips_files)
    train_autoencoder(config)
    assert read_log(tmp_path / "ae", "start")[0]["perceptual"] == "LPIPS, AlexNet"
    with pytest.raises(ValueError, match="has SHA-256 .*, needed one that begins with 7be5be79"):
        train_autoencoder(replace(config, alexnet_sha256="", out=str(tmp_path / "other")))
    with pytest.raises(FileNotFoundError, match="gone: no such file; needed weights of AlexNet"):
        train_autoencoder(replace(config, alexnet="gone", out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "auto"}, "frames of 32x32: .* name one by --network"),
        ({"batch_size": 46}, "has 90 frames to learn from, fewer than one step takes"),
        ({"num_frames": 19}, "clips of 19 frames were asked for"),
    ],
)
def test_data_that_does_not_fit_is_refused(videos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_autoencoder(settings(videos, tmp_path / "ae", **changes))
    assert not (tmp_path / "ae").exists()


def test_frames_that_no_cell_or_patch_fits_are_refused(tmp_path):
    for height, width, message in (
        (36, 40, "36x40 pixels cannot be cut into cells of 8x8"),
        (16, 40, "discriminator of patches needs frames of 24x24 or more, .* has 16x40"),
    ):
        folder = tmp_path / f"{height}"
        pixels = torch.zeros(6, height, width, 3, dtype=torch.uint8).numpy()
        nothing = ConditionSpec()
        card = DataCard(height=height, width=width, fps=5.0, conditions=nothing, action_names=())
        entries = [
            write_episode(folder, name, pixels, None, fps=5.0, split=name)
            for name in ("train", "val")
        ]
        write_card(folder, card)
        write_manifest(folder, entries)
        with pytest.raises(ValueError, match=message):
            train_autoencoder(settings(str(folder), tmp_path / "ae"))
    assert not (tmp_path / "ae").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstruction_steps": 0}, "reconstruction_steps must be 1 or more"),
        ({"adversarial_weight": -1.0}, "adversarial_weight must be 0 or more"),
        ({"latent_noise": float("nan")}, "latent_noise must be 0 or more"),
        ({"border_weight": 2.0}, "no effect with edge_weight 0"),
        ({"edge_weight": 1.0, "adversarial_steps": 0}, "of the second part and have no effect"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"lpips_heads": "alex.pth"}, "no effect without alexnet"),
        ({"alexnet_sha256": "7be5be79"}, "a file that alexnet does not name"),
        ({"optim": OptimConfig(decoder_lr_ratio=2.0)}, "trained at one learning rate"),
    ],
)
def test_settings_out_of_range_are_refused(videos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(videos, tmp_path, **changes)


def test_other_and_damaged_trainings_are_refused(videos, tmp_path):
    out = tmp_path / "ae"
    config = settings(videos, out, reconstruction_steps=1, adversarial_steps=0)
    train_autoencoder(config)
    with pytest.raises(FileExistsError, match="holds a run with other settings .*seed: 0, 1"):
        train_autoencoder(replace(config, seed=1))
    with pytest.raises(FileExistsError, match="resume is 'never'"):
        train_autoencoder(replace(config, resume="never"))
    more = replace(config, adversarial_steps=1)
    step = out / "step_000001"
    for name, message in (
        ("optimizer.pt", "optimizer.pt cannot be read as a state of training: it is damaged"),
        ("raw.safetensors", "raw.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("progress.json", "progress.json: is not JSON"),
    ):
        whole = (step / name).read_bytes()
        (step / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=message):
            train_autoencoder(more)
        (step / name).write_bytes(whole)
    (step / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match="step_000001, which .*last names, is not whole"):
        train_autoencoder(more)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not the folder of a run"):
        train_autoencoder(replace(config, out=str(tmp_path / "mine")))


def test_the_command_says_what_was_reached(videos, tmp_path, capsys):
    words = ["train-autoencoder", "--data", videos, "--out", str(tmp_path / "ae")]
    words += ["--network", "small-8", "--reconstruction-steps", "1", "--adversarial-steps", "0"]
    words += ["--batch-size", "2", "--num-frames", "1", "--num-validation-clips", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "held-out reconstruction: PSNR " in printed and "saved" in printed
    assert main([*words, "--device", "cpu", "--seed", "1"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
