"""Wan worlds that actions steer: converted, encoded, trained and streamed by the commands alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import rollouts
from scd.cli import main
from scd.common.runlog import read_log
from scd.data.clip import Conditions
from scd.data.latents import LatentSource
from scd.data.source import open_source
from scd.models.checkpoint import load_world
from scd.sampling.pipeline import SCDPipeline
from scd.sampling.settings import VideoConfig
from scd.sampling.text_to_video import Script, TextToVideo
from scd.streaming.rollout import Rollout
from tests.tiny_wan_run import encode_with, words_of, write_clips, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Clips with actions and prompts, a world that both steer, and the clips' latents."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        clips = write_clips(folder / "clips", num_actions=3)
        _, world = write_world(folder / "steered", "--actions", clips)
        yield clips, world, encode_with(world, clips, folder / "latents")


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    _, world, latents = made
    out = tmp_path_factory.mktemp("run") / "run"
    changes = "--validate-every", "4", "--sample-every", "4"
    assert main(words_of(latents, world, out, *changes)) == 0
    return out


def test_latents_have_the_actions_of_all_their_frames(made):
    clips, world, latents = made
    stored, videos = LatentSource(latents, "train"), open_source(clips, "train")
    spec = stored.card.conditions
    assert spec == load_world(world).card.conditions
    assert (spec.num_actions, spec.actions_per_frame, spec.text_length) == (3, 4, 16)
    assert stored.card.action_names == ("a", "b", "c")
    shown, clip = videos.read(1, 0, 17).actions, stored.read(1, 0, 5)
    assert clip.actions[0].tolist() == [int(shown[0])] * 4
    assert torch.equal(clip.actions[1:].flatten(), shown[1:])
    assert torch.equal(stored.read(1, 2, 3).actions, clip.actions[2:])


def test_training_moves_the_weights_of_actions(made, run):
    _, world, _ = made
    events = list(read_log(run))
    (validation,) = [event for event in events if event["event"] == "validation"]
    assert "action_gap" in validation and validation["loss"] > 0
    before, after = load_world(world).model, load_world(run).model
    for part in ("encoder", "decoder"):
        first, last = (
            getattr(model, part).condition_embedder.action_embedder for model in (before, after)
        )
        assert not first.pool.linear_2.weight.any() and last.pool.linear_2.weight.any()
    assert list((run / "samples").iterdir())


def test_the_trained_world_streams_by_action_and_text(made, run):
    clips, _, latents = made
    world = load_world(run)
    text = LatentSource(latents, "val").read(0, 0, 1).text[None]
    clip = open_source(clips, "val").read(0, 0, 9)
    rollout = Rollout(world, engine="fast")
    shown = rollout.begin(clip, Conditions(text=text))
    assert shown.shape[1] == 9 and rollout.num_frames == 3
    held = rollout.step_video("b")
    assert held.shape == (1, 4, 3, 32, 32)
    rollout.reset()
    assert torch.equal(rollout.step_video(torch.tensor([[1, 1, 1, 1]])), held)
    rollout.reset()
    other = rollout.step_video(torch.tensor([[1, 1, 1, 2]]))
    assert not torch.equal(other, held)
    with pytest.raises(ValueError, match="action ids must lie in 0 .. 2"):
        rollout.step_video(3)
    with pytest.raises(ValueError, match="steered by actions, but none were given"):
        rollout.step_video()


def test_videos_of_prompts_hold_actions(made, run, tmp_path, capsys):
    config = VideoConfig(run=str(run), precision="fp32", action="b", device="cpu")
    parts = TextToVideo(config)
    text, held = parts.embed(["snow at night"]), parts.held({2: '{"keys": ["c"]}'})
    assert {place: action.tolist() for place, action in held.items()} == {0: [1], 2: [2]}
    found = parts.video(3, Script(text=text, num_latents=4, actions=held)).frames
    rollout = Rollout(load_world(run), seed=3, engine="fast")
    rollout.begin(conditions=Conditions(text=text))
    wanted = torch.cat([rollout.step_video(name)[0] for name in "bbcc"])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    given = parts.encode(torch.zeros(1, 1, 3, 32, 32))
    script = Script(text=text, num_latents=3, given=given, actions=held)
    still = parts.video(3, replace(script, actions={0: torch.tensor([0])}))
    assert not torch.equal(parts.video(3, script).frames, still.frames)
    pipe = SCDPipeline.from_pretrained(run, torch_dtype=torch.float32, action="b")
    generator = torch.Generator().manual_seed(3)
    shown = pipe("snow at night", num_frames=5, generator=generator, output_type="pt").frames[0]
    torch.testing.assert_close(shown * 2 - 1, wanted[:5], atol=1e-4, rtol=0)
    words = ["--seconds", "0.5", "--precision", "fp32", "--out"]
    sample = ["sample", str(run), "--prompt", "snow", *words]
    assert main([*sample, str(tmp_path / "a"), "--action", "c", "--action-at", "0.3: a"]) == 0
    capsys.readouterr()
    assert main([*sample, str(tmp_path / "b"), "--action", "jump"]) == 2
    assert "no action is called 'jump'" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("snow\n")
    vbench = ["vbench", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--seeds", "1"]
    assert main([*vbench, *words, str(tmp_path / "videos"), "--action", "1"]) == 0
    assert main([*vbench, *words, str(tmp_path / "videos")]) == 2
    assert "holds another set of videos" in capsys.readouterr().err


def test_rollouts_are_scored(made, run, tmp_path, capsys):
    """By hand: two numbers a frame, two samples. Then a run beside itself in fewer steps."""
    one = torch.tensor([[[[0.0, 0.0]]], [[[3.0, 4.0]]]])
    other = torch.tensor([[[[0.0, 0.0]]]])
    assert rollouts.apart(one, one).tolist() == pytest.approx([5 / 2**0.5])
    assert rollouts.apart(one, other).tolist() == pytest.approx([2.5 / 2**0.5])
    _, _, latents = made
    settings = {"data": latents, "given": 2, "frames": 2, "clips_per_episode": 2, "samples": 6}
    ways = f"{run}@1", f"{run}@8"
    settings |= {"picture": str(tmp_path / "rows.png"), "held": ("b", "c")}
    result = rollouts.measure(rollouts.RolloutsConfig(reference=f"{run}@8", ways=ways, **settings))
    assert result["clips"] == 4
    # Five rows of the last given frame and two more, each of 32 rows and columns or more.
    height, width, _ = np.asarray(Image.open(tmp_path / "rows.png")).shape
    assert height > 5 * 32 and width > 3 * 32
    few, same = (result["ways"][way] for way in ways)
    assert same["spread"] == pytest.approx(1, abs=0.1)
    assert abs(same["distance"]["mean"]) < few["distance"]["mean"] / 2
    assert few["score_over_first"]["mean"] == 0 and same["score"]["mean"] > 0
    assert result["reference_score"] == pytest.approx(same["score"]["mean"], rel=0.05)
    assert all(line["wrong_db"]["mean"] != 0 for line in (few, same))
    assert all(line["nearer"]["mean"] in (0, 0.25, 0.5, 0.75, 1) for line in (few, same))
    words = ["--data", latents, "--reference", f"{run}@2", "--ways"]
    assert rollouts.main([*words, "run"]) == 2
    assert "RUN@2, got 'run'" in capsys.readouterr().err
    assert rollouts.main([*words, f"{run}@2", "--frames", "20"]) == 2
    assert "two episodes of 25 latent frames" in capsys.readouterr().err
    few = [f"{run}@2", "--given", "2", "--frames", "1", "--samples", "2", "--picture", "a.png"]
    assert rollouts.main([*words, *few, "--held", "left"]) == 2
    assert "held must be of ['a', 'b', 'c'], got 'left'" in capsys.readouterr().err


def test_data_of_other_conditions_is_refused(made, run, tmp_path, capsys):
    clips, world, latents = made
    out = tmp_path / "out"

    def refused(data, initial, *needed):
        assert main(words_of(data, initial, out)) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in needed), said
        assert not out.exists()

    _, plain = write_world(tmp_path / "text")
    refused(latents, plain, "has actions", "is steered by a text alone", "--actions")
    bare = encode_with(world, write_clips(tmp_path / "bare"), tmp_path / "bare-latents")
    refused(bare, world, "is steered by actions", "has none beside its prompts")
    mute = write_clips(tmp_path / "mute", num_actions=3, prompts=False)
    mute = encode_with(world, mute, tmp_path / "mute-latents", text="")
    refused(mute, world, "holds latents without prompts")
    five = encode_with(world, write_clips(tmp_path / "five", 5), tmp_path / "five-latents")
    refused(five, world, "has other actions than", "num_actions: 5", "3")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("snow\n")
    words = ["distill", "wan-dmd", str(run), "--prompts", str(prompts), "--teacher", plain]
    assert main(words) == 2
    assert "which no bidirectional teacher knows" in capsys.readouterr().err
    assert main(["export", "diffusers", str(run), "--out", str(tmp_path / "exported")]) == 2
    assert "steered by actions, whose weights" in capsys.readouterr().err
