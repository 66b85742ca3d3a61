"""Stored latents: what is written is what the autoencoder makes, by any number of processes, and
whatever is torn, changed or missing is noticed."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.build import fingerprint, open_autoencoder
from scd.autoencoders.config import PixelConfig
from scd.autoencoders.text_encoder import PromptEmbedder, TextConfig
from scd.cli import main
from scd.common.config import to_json
from scd.common.runtime import cpu_threads
from scd.data.clip import Batch, check_conditions
from scd.data.latents import LatentSource, open_file, read_info
from scd.data.loader import Loader
from scd.data.manifest import read_manifest, write_manifest
from scd.data.record import record
from scd.data.source import open_source
from scd.data.toy import ToyRecording
from scd.models.build import build
from scd.models.checkpoint import World, load_world, save_world
from scd.models.config import BlockConfig, DenseConfig, FrameShape
from scd.preprocessing import encode as module
from scd.preprocessing.encode import EncodeConfig, encode
from scd.training.config import TrainConfig
from scd.training.fit import decides, fit_to_data, open_loader
from scd.training.presets import preset
from scd.training.world import train
from tests.layouts import published_latents, write_minecraft_latents
from tests.tiny_wan_vae import TEXT_DIM, tiny_vae, write_tiny_parts

TINY_SHAPE = FrameShape(height=32, width=32, patch_size=16)
LATENT_SHAPE = FrameShape(channels=16, height=4, width=4, patch_size=2)
TINY_BLOCK = BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    """Five train, one val and one test episode of the toy world."""
    out = tmp_path_factory.mktemp("toy") / "videos"
    shares = {"val_fraction": 0.2, "test_fraction": 0.1}
    return str(record(ToyRecording(out=str(out), episodes=7, frames=18, workers=1, **shares)))


def settings(videos: str, out, **changes) -> EncodeConfig:
    given = EncodeConfig(
        data=videos, autoencoder="pixels", out=str(out), episodes_per_file=2, device="cpu"
    )
    return replace(given, **changes)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def latents(videos, tmp_path_factory):
    """The encoding of all of them, by their pixels."""
    out = tmp_path_factory.mktemp("latents") / "all"
    encode(settings(videos, out))
    return out


def test_latents_are_what_the_autoencoder_makes(videos, latents):
    info = read_info(latents)
    assert (info.shape, info.train, info.val) == ((3, 32, 32), (18,) * 5, (18,))
    autoencoder = PixelAutoencoder(
        PixelConfig(mean=info.autoencoder["mean"], std=info.autoencoder["std"])
    )
    for split in ("train", "val", "test"):
        stored, source = LatentSource(latents, split), open_source(videos, split)
        assert stored.num_episodes == source.num_episodes and stored.card == source.card
        for episode in range(source.num_episodes):
            clip, found = source.read(episode, 5, 9), stored.read(episode, 5, 9)
            expected = autoencoder.encode(clip.frames[None])[0]
            assert found.encoded and torch.equal(found.frames, expected.half().float())
            assert torch.equal(found.actions, clip.actions)
    with pytest.raises(ValueError, match=r"episode 0: latent frames 15 .. 19 .* has 18"):
        stored.read(0, 15, 5)


def test_chosen_threads_change_rounding_only(videos, latents, tmp_path):
    with cpu_threads(4):
        encode(settings(videos, tmp_path / "chosen", batch_size=3))
        encode(settings(videos, tmp_path / "three", threads=3))
        assert torch.get_num_threads() == 4
    expected = LatentSource(latents, "train").read(1, 0, 18).frames
    for name in ("chosen", "three"):
        found = LatentSource(tmp_path / name, "train").read(1, 0, 18).frames
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_several_processes_write_the_same_files(videos, latents, tmp_path):
    out = tmp_path / "shared"
    first = encode(settings(videos, out, shard="1/3"))
    assert first.files_written == 2 and first.files_left == 3
    with pytest.raises(ValueError, match=r"2 of 3 files of split 'train' are not there.*--shard"):
        LatentSource(out, "train")
    for shard in ("0/3", "2/3"):
        encode(settings(videos, out, shard=shard))
    assert files(out) == files(latents)


def test_an_interrupted_encoding_goes_on(videos, latents, tmp_path, monkeypatch):
    out, write, written = tmp_path / "part", module.write_episodes, []

    def stop_at_the_third(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[3])
        write(*arguments)

    monkeypatch.setattr(module, "write_episodes", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(settings(videos, out))
    # What a killed process leaves behind.
    torn = out / ".writing-val-00000-of-00001.safetensors-1"
    torn.write_bytes(b"half")
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*")}
    result = encode(settings(videos, out))
    assert (result.files_written, result.files_found, result.files_left) == (3, 2, 0)
    assert files(out) == files(latents)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    again = encode(settings(videos, out))
    assert (again.files_written, again.files_found, again.frames) == (0, 5, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("video", r"\(train\): changed: videos/\S+ \(video\)"),
        ("actions", r"\(train\): changed: videos/\S+ \(actions\)"),
        ("order", r"\(train\): its episodes are in another order"),
        ("rate", r"\(train\): its card \(fps: "),
    ],
)
def test_other_videos_than_it_was_begun_with_are_refused(videos, tmp_path, change, words):
    folder, out = shutil.copytree(videos, tmp_path / "videos"), tmp_path / "out"
    encode(settings(str(folder), out))
    before = files(out)
    # As if it had been interrupted; what is whole is not encoded again, and would not be noticed.
    (out / "train-00001-of-00003.safetensors").unlink()
    one, other, *_ = train = [one for one in read_manifest(folder) if one.split == "train"]
    data = str(folder)
    if change == "video":
        shutil.copy(folder / other.video, folder / one.video)
    elif change == "actions":
        np.savez(folder / one.actions, actions=np.roll(np.load(folder / one.actions)["actions"], 1))
    elif change == "order":
        others = [one for one in read_manifest(folder) if one.split != "train"]
        write_manifest(folder, train[::-1] + others)
    else:
        data += "?fps=20"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"not the data that .* was begun with {words}"):
            encode(settings(data, out))
    # The same videos, as they were and at another place.
    assert encode(settings(videos, out)).files_written == 1
    assert files(out) == before


@pytest.mark.parametrize("how", ["cut off", "header only", "other bytes", "of another encoding"])
def test_a_torn_file_is_refused_and_written_again(videos, latents, tmp_path, how, caplog):
    out = tmp_path / "torn"
    encode(settings(videos, out))
    path = out / "train-00001-of-00003.safetensors"
    whole = path.read_bytes()
    if how == "of another encoding":
        path.write_bytes((out / "val-00000-of-00001.safetensors").read_bytes())
    else:
        cut = {"cut off": len(whole) - 7, "header only": 9, "other bytes": 0}[how]
        path.write_bytes(whole[:cut] or b"no tensors at all")
    message = "is not of this encoding" if how == "of another encoding" else "cut off or damaged"
    with pytest.raises(ValueError, match=f"train-00001-of-00003.safetensors .*{message}"):
        LatentSource(out, "train")
    with caplog.at_level(logging.WARNING):
        assert encode(settings(videos, out)).files_written == 1
    assert message in caplog.text and files(out) == files(latents)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latents", lambda old: old[:, :1], "needed finite latents of shape"),
        ("latents", lambda old: old[0, 0, 0, 0], "0-dim"),
        ("latents", lambda old: old * float("nan"), "needed finite latents of shape"),
        ("latents", lambda old: old[:2], "needed finite latents of shape"),
        ("actions", lambda old: old + 100, "action ids must lie in 0"),
        ("actions", lambda old: old.float(), "discrete actions are integers"),
        ("actions", lambda old: old[:, None], "actions have the shape"),
        ("actions", lambda old: None, "actions are there, or are missing"),
    ],
)
def test_a_clip_that_was_never_encoded_is_refused(latents, tmp_path, name, change, message):
    out = shutil.copytree(latents, tmp_path / "latents")
    path = next(out.glob("train-00000*"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    changed = change(tensors.pop(f"000000.{name}"))
    if changed is not None:
        tensors[f"000000.{name}"] = changed.contiguous()
    save_file(tensors, path, metadata)
    source = LatentSource(out, "train")
    assert len(source.read(1, 0, 4)) == 4
    with pytest.raises(ValueError, match=rf"{path.name}: episode 0 is damaged .*({message})"):
        source.read(0, 0, 4)


def test_another_encoding_is_never_overwritten(videos, tmp_path):
    out = tmp_path / "kept"
    encode(settings(videos, out, stored="fp32"))
    before = files(out)
    other = save_world(world_of(videos, PixelConfig(mean=0.25, std=0.5)), tmp_path / "world")
    for changes, message in (
        ({"autoencoder": str(other), "stored": "fp32"}, "autoencoder.mean: .*, 0.25"),
        ({"stored": "bf16"}, "stored: 'fp32', 'bf16'"),
        ({"splits": ("train",), "stored": "fp32"}, r"test: \[18\], \[\]"),
    ):
        with pytest.raises(FileExistsError, match=f"holds another encoding .*{message}"):
            encode(settings(videos, out, **changes))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other things than latents"):
        encode(settings(videos, tmp_path / "mine"))
    assert files(out) == before


def world_of(videos: str, autoencoder: PixelConfig) -> World:
    card = open_source(videos, "train").card
    model = build(
        DenseConfig(shape=TINY_SHAPE, block=TINY_BLOCK, num_layers=1, conditions=card.conditions)
    )
    return World(model, PixelAutoencoder(autoencoder), card, preset("toy").sampling)


def run_on(data, out, **changes) -> TrainConfig:
    base = replace(preset("toy"), data=str(data), precision="fp32", batch_size=2, num_frames=6)
    model = DenseConfig(shape=TINY_SHAPE, block=TINY_BLOCK, num_layers=1, predict="clean")
    objective = replace(base.objective, context_noise=0.0)
    base = replace(
        base, model=model, objective=objective, sampling=replace(base.sampling, num_steps=2)
    )
    base = replace(base, out=str(out), max_steps=2, num_validation_clips=2, device="cpu")
    return replace(base, **changes)


def test_training_reads_latents_and_everything_else_the_videos(videos, tmp_path):
    out = tmp_path / "exact"
    encode(settings(videos, out, stored="fp32"))
    config = fit_to_data(run_on(out, tmp_path / "latents"))
    assert to_json(config.autoencoder) == read_info(out).autoencoder
    plain = replace(config, data=videos, out=str(tmp_path / "videos"))
    runs = [load_world(train(one)) for one in (config, plain)]
    # Unit scale and 32 bits: the same latents, so the same weights.
    for one, other in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        torch.testing.assert_close(one, other)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("latents", "videos")]
    losses = [
        [json.loads(line) for line in log.splitlines() if '"validation"' in line] for log in logs
    ]
    assert "loss_at_0.5" in losses[0][0]
    for key in (key for key in losses[0][0] if key.startswith("loss")):
        assert losses[0][0][key] == pytest.approx(losses[1][0][key], rel=1e-5)
    assert (tmp_path / "latents/samples/step_000002.png").is_file()
    assert torch.equal(
        open_source(str(out), "val").read(0, 0, 4).frames,
        open_source(videos, "val").read(0, 0, 4).frames,
    )


def test_latents_of_another_autoencoder_are_refused(videos, latents, tmp_path):
    config = fit_to_data(run_on(latents, tmp_path / "run"))
    other = replace(config, autoencoder=PixelConfig(mean=0.5, std=0.25))
    with pytest.raises(ValueError, match="latents of another autoencoder .*mean: .*, 0.5"):
        open_loader(other, 0, 1)
    with pytest.raises(ValueError, match="autoencoder.mean is 0.5, but .* leave it to the data"):
        fit_to_data(other, run_on(latents, tmp_path / "run"))
    assert decides(replace(preset("scd-m"), data=str(latents)))
    assert not decides(preset("scd-m"))


def test_several_threads_read_the_same_clips(latents):
    source = LatentSource(latents, "train")
    loader = Loader(source, 3, 5, seed=0)
    with ThreadPoolExecutor(4) as pool:
        side_by_side = list(pool.map(loader.batch, range(24)))
    for index, batch in enumerate(side_by_side):
        assert batch.encoded and torch.equal(batch.frames, loader.batch(index).frames)


def test_clips_of_pixels_and_of_latents_do_not_mix(videos, latents):
    clips = [
        open_source(videos, "train").read(0, 0, 4),
        LatentSource(latents, "train").read(0, 0, 4),
    ]
    with pytest.raises(ValueError, match="some clips of the batch are pixels and some are latents"):
        Batch.of(clips)


def test_latents_without_their_videos_still_train(videos, latents, tmp_path):
    moved = tmp_path / "alone"
    moved.mkdir()
    for name, data in files(latents).items():
        (moved / name).write_bytes(data)
    info = json.loads((moved / "latents.json").read_text())
    (moved / "latents.json").write_text(json.dumps(info | {"data": str(tmp_path / "gone")}))
    assert open_source(str(moved), "train", latents=True).num_episodes == 5
    with pytest.raises(
        FileNotFoundError, match="holds latents of .*gone, and this needs the video"
    ):
        open_source(str(moved), "val")


def without_actions(videos: str, tmp_path, prompts: bool = False) -> str:
    """The same videos as a folder that nothing steers; half of the prompts lie beside them."""
    folder = tmp_path / "bare"
    (folder / "videos").mkdir(parents=True)
    entries = []
    for number, entry in enumerate(read_manifest(open_source(videos, "train").path)):
        (folder / entry.video).write_bytes(
            (open_source(videos, "train").path / entry.video).read_bytes()
        )
        words = f"a red ball {'jumps ' * number}"
        if number % 2:
            (folder / entry.video).with_suffix(".txt").write_text(words + "\n")
        entries.append(
            replace(entry, actions=None, prompt=None if number % 2 or not prompts else words)
        )
    write_manifest(folder, entries)
    card = json.loads((open_source(videos, "train").path / "dataset.json").read_text())
    card |= {"conditions": {"num_actions": 0, "action_dim": 0, "num_labels": 0}, "action_names": []}
    (folder / "dataset.json").write_text(json.dumps(card))
    return str(folder)


def test_wans_autoencoder_and_prompts(videos, tmp_path):
    parts = write_tiny_parts(tmp_path / "wan")
    given = {
        "autoencoder": str(parts),
        "text_encoder": str(parts),
        "text_length": 12,
        "stored": "fp32",
    }
    bare = without_actions(videos, tmp_path)
    with pytest.raises(ValueError, match="000000.mp4 has no prompt: .* or 000000.txt beside it"):
        encode(settings(bare, tmp_path / "out", **given))
    bare = without_actions(videos, tmp_path / "again", prompts=True)
    encode(settings(bare, tmp_path / "latents", **given))
    source, pixels = LatentSource(tmp_path / "latents", "train"), open_source(bare, "train")
    # 18 frames: the first, and four times four; one is left over.
    assert source.num_frames(0) == 5 and source.info.shape == (16, 4, 4)
    autoencoder = open_autoencoder(str(parts))
    frames = pixels.read(1, 0, 17).frames
    torch.testing.assert_close(source.read(1, 0, 5).frames, autoencoder.encode(frames[None])[0])
    embedder = PromptEmbedder(str(parts), TextConfig(length=12))
    assert source.card.conditions.text_length == 12
    assert source.card.conditions.text_dim == TEXT_DIM
    batch = Batch.of([source.read(0, 1, 3), source.read(1, 1, 3)])
    words = embedder.embed([pixels.prompt(0), pixels.prompt(1)]).float()
    torch.testing.assert_close(batch.conditions.text, words)
    torch.testing.assert_close(batch.conditions.null_text, embedder.embed(["", ""]).float())
    check_conditions(source.card.conditions, batch.conditions)
    (tmp_path / "latents/null_text.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="null_text.safetensors is missing or damaged"):
        LatentSource(tmp_path / "latents", "train")


def test_weights_make_the_fingerprint_and_their_place_does_not(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, seed in ((one, 0), (same, 0), (other, 1)):
        tiny_vae(seed).save_pretrained(folder / "vae")
    prints = [fingerprint(open_autoencoder(str(folder))) for folder in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(PixelAutoencoder(PixelConfig())) != fingerprint(
        PixelAutoencoder(PixelConfig(std=2.0))
    )


def test_changed_weights_of_the_same_name_are_noticed(videos, tmp_path):
    bare, vae = without_actions(videos, tmp_path), tmp_path / "wan"
    tiny_vae(0).save_pretrained(vae / "vae")
    encode(settings(bare, tmp_path / "latents", autoencoder=str(vae)))
    source = LatentSource(tmp_path / "latents", "train")
    config = run_on(tmp_path / "latents", tmp_path / "run", num_frames=4)
    config = replace(fit_to_data(replace(config, model=replace(config.model, shape=LATENT_SHAPE))))
    assert open_loader(config, 0, 1).source.num_episodes == source.num_episodes
    tiny_vae(1).save_pretrained(vae / "vae")
    with pytest.raises(ValueError, match="an autoencoder with other weights"):
        open_loader(config, 0, 1)
    with pytest.raises(FileExistsError, match="holds another encoding .*fingerprint"):
        encode(settings(bare, tmp_path / "latents", autoencoder=str(vae)))


def test_published_latents_are_taken_over_at_unit_scale(tmp_path):
    root = write_minecraft_latents(tmp_path / "published", ".pt", side=32)
    data = f"minecraft:{root}?size=32&frames=20"
    world = save_world(world_of("toy:32", PixelConfig(mean=0.1, std=0.3)), tmp_path / "world")
    given = {"autoencoder": str(world), "stored": "fp32"}
    encode(settings(data, tmp_path / "out", latent_scale=0.2889, **given))
    clip = LatentSource(tmp_path / "out", "train").read(1, 2, 9)
    assert torch.equal(clip.frames, published_latents(20, 3, 32, 1)[2:11] * 0.2889)
    assert 0.9 < clip.frames.std() < 1.1
    small = write_minecraft_latents(tmp_path / "small", ".npy", side=8)
    with pytest.raises(ValueError, match=r"latents of \(3, 8, 8\), .* makes \(3, 32, 32\)"):
        encode(settings(f"minecraft:{small}?size=32&frames=20", tmp_path / "no", **given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "3/3"}, "shard must be i/n"),
        ({"shard": "1"}, "shard must be i/n"),
        ({"splits": ()}, "splits must be named once each"),
        ({"latent_scale": 0.0}, "latent_scale must be above 0"),
        ({"threads": 0}, "threads must be auto, or 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(videos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(videos, tmp_path / "out", **changes)


def test_what_cannot_be_encoded_is_refused(videos, latents, tmp_path):
    for changes, kind, message in (
        ({"data": "toy:32"}, ValueError, "record it first"),
        ({"data": str(latents)}, ValueError, "holds latents already"),
        ({"data": str(tmp_path / "gone")}, FileNotFoundError, "gone: no such data folder"),
        ({"autoencoder": str(tmp_path / "gone")}, FileNotFoundError, "there is no folder"),
        ({"latent_scale": 2.0}, ValueError, "latent_scale is for published latents"),
    ):
        with pytest.raises(kind, match=message):
            encode(settings(videos, tmp_path / "out", **changes))


def test_the_command_writes_and_says_so(videos, tmp_path, capsys):
    out = tmp_path / "latents"
    words = ["encode", videos, "--autoencoder", "pixels", "--out", str(out), "--device", "cpu"]
    assert main([*words, "--shard", "0/2"]) == 0
    assert "2 files written, 0 were there" in capsys.readouterr().out
    assert main([*words, "--stored", "bf16"]) == 2
    assert "holds another encoding" in capsys.readouterr().err
    assert open_file(out, read_info(out), "train", 0).keys()


def test_the_precision_holds_for_the_autoencoder_of_a_world_too(videos, tmp_path):
    bare, vae = without_actions(videos, tmp_path), tmp_path / "wan"
    tiny_vae(0).save_pretrained(vae / "vae")
    world = world_of(bare, PixelConfig())
    model = replace(world.model.config, shape=LATENT_SHAPE)
    wan = World(build(model), open_autoencoder(str(vae)), world.card, world.sampling)
    places = {"folder": str(vae), "world": str(save_world(wan, tmp_path / "world"))}
    for name, place in places.items():
        for precision in ("fp32", "bf16"):
            out = tmp_path / f"{name}-{precision}"
            encode(settings(bare, out, autoencoder=place, precision=precision, stored="fp32"))
    folders = [tmp_path / name for name in ("folder-bf16", "world-bf16", "world-fp32")]
    given, rounded, exact = (LatentSource(one, "train").read(0, 0, 5).frames for one in folders)
    assert torch.equal(rounded, given) and not torch.equal(rounded, exact)
    # The weights are the same, and training takes the latents for what they are.
    assert len({read_info(folder).fingerprint for folder in folders}) == 1
    config = run_on(folders[1], tmp_path / "run", num_frames=4, model=model)
    assert open_loader(fit_to_data(config), 0, 1).source.num_episodes == 5
    pixels = str(save_world(world, tmp_path / "pixels"))
    for place in ("pixels", pixels):
        with pytest.raises(ValueError, match="precision bf16 has no effect: .*pixels has pixels"):
            encode(settings(bare, tmp_path / "no", autoencoder=place, precision="bf16"))
