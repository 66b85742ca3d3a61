"""Stage two of Wan on tiny random weights: what is drawn, scored, trained, refused and written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scd.cli import main
from scd.common.runlog import read_log
from scd.data.clip import Conditions
from scd.data.prompts import PromptSource, is_prompts, read_prompts_info
from scd.models.checkpoint import load_auxiliary, load_world, resolve
from scd.models.flow import clean_from_velocity, guide
from scd.models.wan.config import WanDecoderConfig, WanEncoderConfig
from scd.models.wan.timesteps import warped_times
from scd.objectives.config import MatchConfig
from scd.objectives.distill import guided
from scd.objectives.distribution_matching import Rolled, critic_loss, noised, score_loss
from scd.objectives.self_forcing import self_forced
from scd.training.teacher import Bidirectional
from tests.tiny_wan import (
    CACHE,
    SHAPE,
    random_text,
    tiny_transformer,
    tiny_wan,
    tiny_wan_separable,
    write_tiny_transformer,
)
from tests.tiny_wan_vae import write_tiny_parts

TIMES = warped_times((1000, 750, 500, 250))
PROMPTS = ("the red dog runs", "snow at night", "a blue ball", "the cat jumps over the dog")
WAN_DMD = MatchConfig(
    view="bidirectional", guidance=4.0, num_given_frames=0, num_draws=1, time_per="clip"
)


def steered(batch=2):
    return Conditions(text=random_text(batch), null_text=random_text(batch, seed=9))


def roll(model, exit_step, num_frames=3, seed=3, dtype=torch.float64):
    nothing = torch.zeros(2, 0, *SHAPE.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return self_forced(model, nothing, steered(), num_frames, TIMES, exit_step, generator)


# What is scored.


def test_teacher_and_critic_are_the_published_model():
    """As diffusers' own class sees a clip: all frames at once, at one time."""
    theirs = tiny_transformer().eval()
    model = tiny_wan()
    model.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 2, 4, *SHAPE.shape, generator=generator)
    time = torch.tensor([[0.3, 0.9], [0.5, 0.7]])[..., None].expand(2, 2, 4)
    conditions = steered()
    with torch.no_grad():
        found = Bidirectional(model)(noisy[:, 0], noisy, time, conditions)
        for b in range(2):
            for r in range(2):
                expected = theirs(
                    hidden_states=noisy[b, r].movedim(0, 1)[None],
                    timestep=1000 * time[b, r, :1],
                    encoder_hidden_states=conditions.text[b : b + 1],
                ).sample[0]
                torch.testing.assert_close(
                    found[b, r], expected.movedim(1, 0), rtol=1e-3, atol=2e-4
                )


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_students_gradient_is_dmd_by_hand(num_draws):
    """One time per clip, a guided teacher, the mean distance of the whole clip."""
    config = replace(WAN_DMD, num_draws=num_draws)
    teacher, critic = Bidirectional(tiny_wan()), Bidirectional(tiny_wan(num_layers=3))
    frames = torch.randn(2, 3, *SHAPE.shape, generator=torch.Generator().manual_seed(1))
    frames.requires_grad_()
    seen = Rolled.of(frames[:, :0], frames, steered(), 3, window=8)
    loss = score_loss(guided(teacher, 4.0), critic, seen, config, torch.Generator())
    (gradient,) = torch.autograd.grad(loss, frames)
    drawn = noised(frames.detach(), config, torch.Generator())
    assert (drawn.time == drawn.time[..., :1]).all()
    expected = torch.zeros_like(frames)
    conditions = steered()
    with torch.no_grad():
        for b in range(2):
            for r in range(num_draws):
                noisy, time = drawn.noisy[b, r][None], drawn.time[b, r][None]
                hidden = Conditions(text=conditions.null_text[b : b + 1])
                shown = Conditions(text=conditions.text[b : b + 1])
                branches = [teacher.model.bidirectional(noisy, time, c) for c in (hidden, shown)]
                real = clean_from_velocity(noisy, guide(*branches, 4.0), time)
                fake = critic.model.bidirectional(noisy, time, shown)
                fake = clean_from_velocity(noisy, fake, time)
                scale = (frames[b].detach() - real[0]).abs().mean()
                expected[b] += (fake - real)[0] / scale
    expected = expected / (num_draws * frames.numel())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_critic_learns_the_velocity_of_what_was_generated():
    critic = Bidirectional(tiny_wan())
    frames = torch.randn(2, 3, *SHAPE.shape, generator=torch.Generator().manual_seed(1))
    seen = Rolled.of(frames[:, :0], frames, steered(), 3, window=8)
    loss = critic_loss(critic, seen, WAN_DMD, torch.Generator())
    drawn = noised(frames, WAN_DMD, torch.Generator())
    found = critic.model.bidirectional(drawn.noisy[:, 0], drawn.time[:, 0], steered())
    expected = (found - (drawn.noise - drawn.frames)[:, 0]).square().mean()
    torch.testing.assert_close(loss, expected)


# What the student is pushed by: its exit step and the pass that made the context.


@pytest.mark.parametrize("encoder_noise", ["fresh", "same"])
@pytest.mark.parametrize("exit_step", [0, 3])
def test_gradient_is_that_of_each_frames_context_and_exit_step(encoder_noise, exit_step):
    """All that came before, memory and noisy frame, is a constant."""
    encoder = WanEncoderConfig(num_layers=2, noise=encoder_noise)
    decoder = WanDecoderConfig(num_first=1, num_last=1)
    model = tiny_wan_separable(encoder, decoder).double()
    weights = list(model.parameters())
    found = torch.autograd.grad(roll(model, exit_step).sin().sum(), weights)
    calls = []
    context, velocity = model.context, model.velocity

    def watched_context(state, conditions, noise):
        made = context(state, conditions, noise)
        calls.append((state.fork(), conditions, noise, []))
        return made

    def watched_velocity(made, noisy, time):
        calls[-1][3].append((noisy, time))
        return velocity(made, noisy, time)

    model.context, model.velocity = watched_context, watched_velocity
    with torch.no_grad():
        roll(model, exit_step)
    assert [len(call[3]) for call in calls] == 3 * [exit_step + 1]
    total = torch.zeros((), dtype=torch.float64)
    for state, conditions, noise, inputs in calls:
        assert torch.equal(noise, inputs[0][0]) == (encoder_noise == "same")
        noisy, time = inputs[exit_step]
        assert (time == TIMES[exit_step]).all()
        state.encoder_text = state.decoder_text = None
        made = context(state, conditions, noise)
        total = total + (noisy - TIMES[exit_step] * velocity(made, noisy, time)).sin().sum()
    for mine, expected in zip(found, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        assert mine.any()


@pytest.mark.parametrize("kind", ["separable", "dense"])
def test_recomputed_blocks_give_the_same_gradient(kind):
    """Long after the frames that follow were written to the memory that they read."""
    gradients = []
    for checkpointing in (False, True):
        model = (tiny_wan_separable() if kind == "separable" else tiny_wan(3)).double()
        model.gradient_checkpointing = checkpointing
        frames = roll(model, 1, num_frames=5)
        gradients.append(torch.autograd.grad(frames.sin().sum(), list(model.parameters())))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-12)
        assert plain.any()


def test_what_has_left_the_memory_is_not_recomputed():
    model = tiny_wan_separable(cache=replace(CACHE, window=2)).double()
    model.gradient_checkpointing = True
    with pytest.raises(AssertionError, match="left the cache"):
        roll(model, 0, num_frames=4).sum().backward()
    model.gradient_checkpointing = False
    roll(model, 0, num_frames=4).sum().backward()


# The run, by the command.


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """What Wan2.1 looks like on disk, small: the teacher."""
    folder = write_tiny_parts(tmp_path_factory.mktemp("wan"))
    return write_tiny_transformer(folder, num_layers=3)


def convert(wan, out, split="2,1+1") -> str:
    words = ["convert", "wan", "--model", str(wan), "--split", split, "--out", str(out)]
    sizes = ["--height", "16", "--width", "32", "--text-length", "16", "--window", "4"]
    assert main([*words, *sizes]) == 0
    return str(out)


@pytest.fixture(scope="module")
def world(wan, tmp_path_factory) -> str:
    return convert(wan, tmp_path_factory.mktemp("world") / "separable")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def embedded(world, wan, prompts, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("embedded") / "prompts")
    words = ["--teacher", str(wan), "--embedded", folder, "--negative-prompt", "a dog"]
    words += ["--num-frames", "3", "--only-embed"]
    assert main(["distill", "wan-dmd", world, "--prompts", prompts, *words]) == 0
    return folder


def words_of(world, wan, prompts, out, *changes) -> list[str]:
    words = ["distill", "wan-dmd", world, "--prompts", str(prompts), "--teacher", str(wan)]
    words += ["--out", str(out), "--num-frames", "3", "--device", "cpu", "--max-steps", "2"]
    words += ["--num-accumulation", "1", "--objective.num-critic-updates", "2"]
    words += ["--sample-every", "0", "--optim.lr", "1e-3", "--objective.critic.lr", "1e-3"]
    return [*words, "--objective.min-spread", "0", *changes]


def files_of(run) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    files = {entry.name: entry.read_bytes() for entry in resolve(run).iterdir()}
    progress = json.loads(files.pop("progress.json"))
    progress.pop("elapsed_s")
    return files | {"progress": json.dumps(progress).encode()}


def test_prompts_are_embedded_once(embedded, world, wan, prompts, capsys, monkeypatch):
    info = read_prompts_info(embedded)
    assert info.prompts == PROMPTS and info.negative == "a dog" and info.length == 16
    card = load_world(world).card
    source = PromptSource(embedded, card, (16, 2, 4), 3)
    clip = source.read(1, 0, 3)
    assert source.num_episodes == 4 and clip.frames.shape == (0, 16, 2, 4) and clip.encoded
    words = load_file(Path(embedded) / info.files[1])["words"]
    assert torch.equal(clip.text[: len(words)], words) and not clip.text[len(words) :].any()
    assert clip.null_text is not None and not torch.equal(clip.null_text, clip.text)
    before = {entry: entry.stat().st_mtime_ns for entry in Path(embedded).iterdir()}
    again = ["--teacher", str(wan), "--embedded", embedded, "--num-frames", "3", "--only-embed"]
    monkeypatch.setattr("scd.autoencoders.text_encoder._load_encoder", None)
    same = ["distill", "wan-dmd", world, "--prompts", prompts, *again]
    assert main([*same, "--negative-prompt", "a dog"]) == 0
    assert "4 prompts in" in capsys.readouterr().out
    assert before == {entry: entry.stat().st_mtime_ns for entry in Path(embedded).iterdir()}
    assert main(same) == 2
    assert "differ from" in capsys.readouterr().err


def check_learnt(run, start, wan, num_updates):
    """Both networks moved, the critic as often as asked."""
    assert all(
        {"loss", "critic_loss", "spread", "grad_norm"} <= set(event)
        for event in read_log(run, "step")
    )
    critic = load_auxiliary(resolve(run))["critic"]
    counts = {int(state["step"]) for state in critic["optimizers"][0]["state"].values()}
    assert counts == {num_updates}
    for file in (wan / "transformer").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert not torch.equal(critic["weights"][f"model.{name}"], weight), name
    raw, before = load_world(run, "raw").model, load_world(start).model
    for (name, weight), old in zip(raw.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(weight, old), name


def test_train_resume_stream_and_export(world, wan, embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looks = ["--sample-every", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words_of(world, wan, embedded, whole, *looks)) == 0
    assert main(words_of(world, wan, embedded, parts, *looks, "--max-steps", "1")) == 0
    assert main(words_of(world, wan, embedded, parts, *looks)) == 0
    assert files_of(parts) == files_of(whole)
    losses = [
        [(event["loss"], event["critic_loss"]) for event in read_log(run, "step")]
        for run in (whole, parts)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert (whole / "samples" / "step_000002.png").is_file()
    check_learnt(whole, world, wan, num_updates=4)
    # It streams in its own four steps, and goes back to diffusers.
    out = tmp_path / "video"
    words = ["sample", str(whole), "--prompt", PROMPTS[0], "--seconds", "0.5", "--out", str(out)]
    assert main([*words, "--precision", "fp32"]) == 0
    sampling = json.loads((out / "sample.json").read_text())["model"]["sampling"]
    assert sampling["solver"] == "renoise" and sampling["num_steps"] == 4
    assert tuple(sampling["times"]) == TIMES
    assert main(["export", "diffusers", str(whole), "--out", str(tmp_path / "back")]) == 0


def test_a_dense_student(wan, embedded, tmp_path):
    """Self-Forcing itself, the comparison."""
    start = convert(wan, tmp_path / "start", "dense")
    words = ["--max-steps", "1", "--precision", "fp32"]
    words += ["--optim.state", "offload", "--objective.critic.state", "offload"]
    assert main(words_of(start, wan, embedded, tmp_path / "run", *words)) == 0
    check_learnt(tmp_path / "run", start, wan, num_updates=2)


@pytest.mark.slow
def test_two_processes(world, wan, embedded, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    words = words_of(world, wan, embedded, tmp_path / "run", "--precision", "fp32")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "2", "-m", "scd", *words], env=environment, capture_output=True
    )
    assert process.returncode == 0, process.stderr.decode()
    assert read_log(tmp_path / "run", "start")[0]["num_processes"] == 2
    check_learnt(tmp_path / "run", world, wan, num_updates=4)


def test_a_dense_world_teaches_as_the_folder_that_it_was_made_of(
    wan, world, embedded, tmp_path, capsys
):
    """And the critic may begin as another model than the teacher."""
    dense = convert(wan, tmp_path / "dense", "dense")
    other = write_tiny_transformer(tmp_path / "other", num_layers=2, seed=5)
    losses = []
    for name, teacher, critic in (("a", wan, ""), ("b", dense, ""), ("c", wan, str(other))):
        changes = ["--max-steps", "1", "--precision", "fp32"]
        if critic:
            changes += ["--objective.critic-model", critic, "--objective.method", "sid"]
        assert main(words_of(world, teacher, embedded, tmp_path / name, *changes)) == 0
        (event,) = read_log(tmp_path / name, "step")
        losses.append((event["loss"], event["critic_loss"]))
    assert losses[0] == losses[1] and losses[0] != losses[2]
    weights = load_auxiliary(resolve(tmp_path / "c"))["critic"]["weights"]
    assert not any(name.startswith("model.blocks.2.") for name in weights)


def test_bad_input_is_refused_before_weights_are_read(
    wan, world, embedded, prompts, tmp_path, capsys, monkeypatch
):
    def refused(*words):
        assert main([str(word) for word in words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    def distil(run=world, teacher=wan, given=embedded, changes=()):
        return refused(*words_of(run, teacher, given, tmp_path / "out", *changes))

    other_text = write_tiny_transformer(tmp_path / "text", num_layers=2, text_dim=16)
    other_latents = write_tiny_transformer(
        tmp_path / "latents", num_layers=2, in_channels=8, out_channels=8
    )
    small = str(shutil.copytree(wan, tmp_path / "small"))
    smaller = tmp_path / "smaller"
    words = ["convert", "wan", "--model", small, "--split", "dense", "--out", str(smaller)]
    assert main([*words, "--height", "16", "--width", "16", "--text-length", "16"]) == 0
    monkeypatch.setattr("scd.training.world.build_model", None)
    monkeypatch.setattr("scd.autoencoders.text_encoder._load_encoder", None)
    assert "the same conditions" in distil(teacher=other_text)
    assert "the same latent frames" in distil(teacher=other_latents)
    assert "the same latent frames" in distil(teacher=smaller)
    assert "holds a WanSeparableConfig: a bidirectional teacher is a dense" in distil(teacher=world)
    assert "there is no folder" in distil(teacher=tmp_path / "nowhere")
    assert "the same latent frames" in distil(
        changes=["--objective.critic-model", str(other_latents)]
    )
    for steps in (["750", "500"], ["1000", "1000"], ["1000", "500", "0"], ["1000", "250", "500"]):
        assert "steps must descend from 1000" in distil(changes=["--steps", *steps])
    assert "window of 4" in distil(
        changes=["--num-frames", "5", "--objective.num-scored-frames", "3"]
    )
    assert "more than the 21 frames that the teacher" in distil(
        changes=["--num-frames", "22", "--no-gradient-checkpointing"]
    )
    assert "needs --prompts" in refused("distill", "wan-dmd", world, "--teacher", wan)
    assert "needs --teacher" in refused("distill", "wan-dmd", world, "--prompts", prompts)
    nowhere = ["distill", "wan-dmd", tmp_path / "no", "--teacher", wan, "--prompts", prompts]
    assert "there is none at" in refused(*nowhere)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "needs a prompt in every line" in distil(given=empty)
    assert not is_prompts(tmp_path / "out-prompts")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "embedded by one process" in distil(given=prompts)
    monkeypatch.delenv("WORLD_SIZE")
    damaged = Path(shutil.copytree(embedded, tmp_path / "damaged"))
    info = read_prompts_info(damaged)
    (damaged / info.negative_file).unlink()
    assert "embed the prompts again" in distil(given=damaged)


def test_a_world_of_actions_is_no_student(wan, prompts, capsys):
    from scd.models.names import WORLDS

    doom = str(WORLDS / "doom")
    words = ["distill", "wan-dmd", doom, "--teacher", str(wan), "--prompts", prompts]
    assert main(words) == 2
    assert "is not a Wan world" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_per": "frame"}, "needs time_per='clip'"),
        ({"critic_start": "student"}, "critic_start='teacher'"),
        ({"num_given_frames": 1}, "num_given_frames=0"),
        ({"method": "gan", "guidance": 1.0}, "method 'dmd' or 'sid'"),
        ({"view": "causal", "critic_model": "a"}, "critic_model, critic_lora have no effect"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WAN_DMD, **changes)
