"""The causal start of a Wan student of few steps: what it reaches, and the run by the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from benchmarks.path_end import PathEndConfig, distances
from scd.cli import main
from scd.common.runlog import read_log
from scd.data.clip import Batch, Conditions
from scd.models.build import build
from scd.models.checkpoint import load_world, resolve
from scd.models.config import FrameShape, SamplingConfig
from scd.models.flow import clean_from_velocity, interpolate, solve, with_num_steps
from scd.models.names import WORLDS
from scd.models.wan.config import WanConfig, WanDecoderConfig, WanEncoderConfig
from scd.models.wan.timesteps import warped_times
from scd.objectives.distill import Consistency, draw, grid_of, guided_path, path_of, running
from scd.objectives.self_forcing import self_forced
from scd.optim.optim import EMA
from scd.streaming.rollout import Rollout
from scd.training.presets import WAN_CONSISTENCY
from tests.tiny import loss_of, shaken
from tests.tiny_wan import (
    BLOCK,
    CACHE,
    SHAPE,
    TEXT,
    random_text,
    tiny_wan,
    tiny_wan_separable,
    wan_clips,
)
from tests.tiny_wan_run import PROMPTS, encode_with, write_clips, write_world

CONFIG = replace(WAN_CONSISTENCY.objective, guidance=1.0)
TIMES = warped_times((1000, 750, 500, 250))
TWO = ["--steps", "1000", "500", "--first-steps", "1000", "750", "500", "250"]


def nowhere():
    """An autocast that changes nothing."""
    return torch.autocast("cpu", enabled=False)


def consistency(student, teacher, target, config=CONFIG):
    return Consistency(
        config=config,
        teacher=guided_path(path_of(teacher, nowhere), config.guidance),
        target=running(target, nowhere),
        frames_per_block=student.config.frames_per_block,
        encoder_noise=student.encoder_noise,
    )


# What is learnt.


def shaped(kind):
    if kind == "separable":
        parts = WanEncoderConfig(num_layers=2), WanDecoderConfig(num_first=1, num_last=1)
        return tiny_wan_separable(*parts)
    size = 3 if kind == "blocks" else 1
    return tiny_wan(num_layers=3, frames_per_block=size, cache=replace(CACHE, window=9))


@pytest.mark.parametrize("kind", ["separable", "dense", "blocks"])
@torch.no_grad()
def test_the_target_is_one_guided_step_of_the_teacher_then_the_averages_jump(kind):
    """By hand: the same times for the frames of a block, and what the encoder reads is the same for
    student, teacher and target."""
    student, teacher, target = (shaped(kind) for _ in range(3))
    for number, model in enumerate((student, teacher, target)):
        for weight in model.parameters():
            weight.mul_(1 + 0.1 * number)
    clean, _, _, _, _ = wan_clips(num_frames=6)
    conditions = Conditions(text=random_text(), null_text=random_text(seed=9))
    config = WAN_CONSISTENCY.objective
    objective = consistency(student, teacher, target, config)
    loss, _ = loss_of(objective, student, clean, conditions, torch.Generator())
    batch, size = Batch(frames=clean, conditions=conditions), student.config.frames_per_block
    noise_kind = student.encoder_noise
    drawn = draw(batch, 48, config, torch.Generator(), False, size, noise_kind)
    place, grid = drawn.place, torch.tensor(grid_of(config))
    assert (place.view(2, -1, size) == place.view(2, -1, size)[..., :1]).all()
    assert len(place.unique()) == 2 * 6 // size
    extra = {"noise": drawn.encoder_noise} if noise_kind == "fresh" else {}
    assert noise_kind == ("fresh" if kind == "separable" else "none")
    noisy = interpolate(drawn.frames, drawn.noise, grid[place])
    estimate = clean_from_velocity(
        noisy, student(clean, noisy, grid[place], conditions, **extra), grid[place]
    )
    hidden, seen = (
        teacher(clean, noisy, grid[place], Conditions(text=text), **extra)
        for text in (conditions.null_text, conditions.text)
    )
    after = grid[place + 1]
    moved = noisy + (after - grid[place])[..., None, None, None] * (hidden + 3 * (seen - hidden))
    jumped = clean_from_velocity(moved, target(clean, moved, after, conditions, **extra), after)
    torch.testing.assert_close(loss, (estimate - jumped).square().mean(), rtol=1e-4, atol=1e-6)


def ends(clean):
    """Where the paths of a known causal teacher end: half the frame before plus one; a first frame
    is a picture of its own."""
    return torch.cat([torch.full_like(clean[:, :1], 0.5), 0.5 * clean[:, :-1] + 1], dim=1)


def known(clean, conditions, num_noisy, num_draws, noise):
    """That teacher: its velocity is exact, so that each path is a straight line."""
    return lambda noisy, time: (noisy - ends(clean)[:, None]) / time[..., None, None, None]


SMALL = FrameShape(channels=1, height=4, width=4, patch_size=2)


def flat_clips(seed, batch=4):
    """Clips of frames of one value each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, 3, 1, 1, 1, generator=generator)
    noise = torch.randn(batch, 1, 3, *SMALL.shape, generator=generator)
    return values.expand(-1, -1, *SMALL.shape), noise, Conditions(text=random_text(batch))


def test_a_student_reaches_the_known_end_of_the_teachers_path():
    """From noise in one step, on other clips than those of its training; and its loss falls."""
    torch.manual_seed(0)
    config = WanConfig(shape=SMALL, block=BLOCK, num_layers=2, conditions=TEXT, cache=CACHE)
    student = shaken(build(config))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0)
    ema = EMA(student, decay=0.9)

    def averaged(*inputs):
        return functional_call(student, ema.state_dict(), inputs)

    def error():
        """Against the known end, in one step from noise."""
        clean, noise, conditions = flat_clips(1000, batch=32)
        time = torch.ones(noise.shape[:3])
        with torch.no_grad():
            found = clean_from_velocity(noise, student(clean, noise, time, conditions), time)
        return (found[:, 0] - ends(clean)).square().mean()

    settings = replace(CONFIG, num_grid_steps=4, grid_shift=1.0)
    objective = Consistency(config=settings, teacher=known, target=averaged)
    losses, before = [], error()
    for step in range(160):
        clean, _, conditions = flat_clips(step)
        generator = torch.Generator().manual_seed(step)
        loss, _ = loss_of(objective, student, clean, conditions, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    assert before > 1 and error() < 0.2


# The steps of a stream, and of rollouts in training.


def test_the_first_frame_has_steps_of_its_own():
    sampling = SamplingConfig(
        num_steps=1, schedule="listed", times=(1.0,), first_times=TIMES, solver="renoise"
    )
    assert with_num_steps(sampling, 2).first_times == TIMES
    assert with_num_steps(sampling, 4).first_times == ()
    for change in ({"first_times": (1.0,)}, {"first_times": (0.9, 0.5)}):
        with pytest.raises(ValueError, match="first_times must"):
            replace(sampling, **change)


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_a_rollout_in_training_is_the_stream(size):
    """Frame by frame or in blocks: the first in its own steps, the others in one."""
    model = tiny_wan(num_layers=3, frames_per_block=size, cache=replace(CACHE, window=9))
    nothing = torch.zeros(2, 0, *SHAPE.shape)
    conditions = Conditions(text=random_text())
    noises = iter(torch.randn(20, 2, *([size] if size > 1 else []), *SHAPE.shape))
    drawn = []

    def draw_noise(*_, **__):
        drawn.append(next(noises))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scd.objectives.self_forcing.torch.randn", draw_noise)
        found = self_forced(
            model, nothing, conditions, 2 * size, [1.0], 0, torch.Generator(), 0, TIMES
        )
    assert len(drawn) == 5 and found.shape[1] == 2 * size
    state = model.begin(None, conditions, 2)
    frames = []
    for first, *others, times in ((*drawn[:4], [*TIMES, 0.0]), (drawn[4], [1.0, 0.0])):
        context = model.context(state, conditions)

        def velocity(noisy, time, context=context):
            return model.velocity(context, noisy, torch.full((2,), time))

        made = solve(velocity, first, times, "renoise", torch.stack(others) if others else None)
        model.observe(state, made, conditions)
        frames.append(made if size > 1 else made[:, None])
    torch.testing.assert_close(found, torch.cat(frames, dim=1), rtol=1e-4, atol=1e-5)


def test_blocks_carry_the_gradient_of_their_last_step():
    model = tiny_wan(num_layers=3, frames_per_block=3, cache=replace(CACHE, window=9))
    nothing = torch.zeros(2, 0, *SHAPE.shape)
    inputs = (Conditions(text=random_text()), 6, [1.0, 0.5], 1, torch.Generator())
    assert not self_forced(model, nothing, *inputs, 0).requires_grad
    gradients = []
    for scored in (3, 6):
        frames = self_forced(model, nothing, *inputs[:4], torch.Generator(), scored)
        frames[:, -3:].sin().sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
        model.zero_grad()
    # Nothing of a block's gradient reaches the blocks before it.
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


# The run, by the command.


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, str, str]:
    """Wan2.1 on disk, a world, and latents with prompts that it encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        wan, world = write_world(tmp_path_factory.mktemp("made"))
        clips = write_clips(tmp_path_factory.mktemp("clips") / "all")
        yield wan, world, encode_with(world, clips, tmp_path_factory.mktemp("latents") / "all")


def words_of(teacher, latents, out, *changes):
    words = ["distill", "wan-consistency", teacher, "--data", latents, "--out", str(out)]
    words += ["--num-frames", "3", "--device", "cpu", "--precision", "fp32", "--max-steps", "4"]
    words += ["--num-accumulation", "1", "--batch-size", "2", "--sample-every", "0"]
    return [*words, "--optim.lr", "1e-3", *changes]


def newest(run: Path) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    files = {entry.name: entry.read_bytes() for entry in resolve(run).iterdir()}
    progress = json.loads(files.pop("progress.json"))
    progress.pop("elapsed_s")
    return files | {"progress": json.dumps(progress).encode()}


def test_run_go_on_bit_for_bit_stream_and_start_dmd(made, tmp_path):
    wan, world, latents = made
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words_of(world, latents, whole, *TWO, "--sample-every", "4")) == 0
    assert (whole / "samples/step_000004.png").is_file()
    part = words_of(world, latents, parts, *TWO, "--save-every", "1")
    for _ in range(4):
        assert main([*part, "--time-limit-s", "0.001"]) == 0
    assert read_log(parts, "resume")[-1]["step"] == 3
    assert newest(parts) == newest(whole)
    student = load_world(whole)
    assert student.sampling.times == TIMES[::2] and student.sampling.first_times == TIMES
    # From nothing four steps, then two; after a given frame two.
    rollout = Rollout(student)
    conditions = Conditions(text=torch.zeros(1, 16, student.card.conditions.text_dim))
    rollout.begin(None, conditions)
    numbers = []
    for _ in range(2):
        numbers.append(len(rollout.times) - 1)
        rollout.step_latents()
    rollout.begin(None, conditions, latents=torch.zeros(1, 1, *student.model.shape.shape))
    assert [*numbers, len(rollout.times) - 1] == [4, 2, 2]
    # Matching goes on from there, in the student's own steps.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    words = ["distill", "wan-dmd", str(whole), "--prompts", str(prompts), "--teacher", wan]
    words += ["--num-frames", "2", "--device", "cpu", "--precision", "fp32", "--max-steps", "1"]
    words += ["--num-accumulation", "1", "--objective.num-critic-updates", "1"]
    words += ["--sample-every", "0", "--objective.min-spread", "0", "--out", str(tmp_path / "dmd")]
    assert main(words) == 0
    assert load_world(tmp_path / "dmd").sampling == student.sampling
    (event,) = read_log(tmp_path / "dmd", "step")
    assert event["loss"] > 0


def test_distances_from_the_end_of_the_path(made, tmp_path):
    """None of the teacher in all its steps; of a student that is the teacher as of it in one."""
    _, world, latents = made
    config = PathEndConfig(
        teacher=world, students=(world,), data=latents, frames=3, steps=6, few=(1, 6)
    )
    found = distances(config)
    assert found["teacher, 6 steps"] == 0 and found["clips"] == 2
    assert found[f"{world}, 1 step"] == pytest.approx(found["teacher, 1 steps"], rel=1e-5) != 0


def test_a_student_in_blocks_of_three(made, tmp_path, capsys):
    wan, world, latents = made
    dense = str(tmp_path / "dense")
    words = ["convert", "wan", "--model", wan, "--split", "dense", "--out", dense]
    words += ["--height", "32", "--width", "32", "--text-length", "16", "--window", "6"]
    assert main([*words, "--frames-per-block", "3", "--copy-parts"]) == 0
    run = str(tmp_path / "run")
    assert main(words_of(dense, latents, run, "--max-steps", "1", "--steps", "1000")) == 0
    student = load_world(run)
    assert student.model.config.frames_per_block == 3 and student.sampling.times == (1.0,)
    # Those blocks are rolled out with gradient, too.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\n")
    words = ["distill", "wan-dmd", run, "--prompts", str(prompts), "--teacher", wan]
    words += ["--device", "cpu", "--precision", "fp32", "--max-steps", "1", "--out"]
    words += [str(tmp_path / "dmd"), "--num-accumulation", "1", "--sample-every", "0"]
    words += ["--objective.num-critic-updates", "1", "--objective.min-spread", "0"]
    assert main([*words, "--num-frames", "3"]) == 0
    assert main([*words, "--num-frames", "4", "--out", str(tmp_path / "no")]) == 2
    assert "whole blocks of the student's 3 frames, got 4" in capsys.readouterr().err
    # Teacher and student go the same way.
    other = words_of(dense, latents, tmp_path / "no", "--model.frames-per-block", "1")
    assert main(other) == 2
    assert "denoises blocks of 3 frames" in capsys.readouterr().err


def test_products_in_bf16_on_a_fine_grid_are_warned_of(made, tmp_path, caplog):
    """Weights stay in float32 nevertheless; on a coarse grid nothing is said."""
    _, world, latents = made
    words = words_of(world, latents, tmp_path / "fine", "--max-steps", "1", "--precision", "bf16")
    assert main(words) == 0
    assert "a grid of 48 steps" in caplog.text
    raw = load_file(resolve(tmp_path / "fine") / "raw.safetensors")
    assert {weight.dtype for weight in raw.values()} == {torch.float32}
    caplog.clear()
    words[words.index("--out") + 1] = str(tmp_path / "coarse")
    assert main([*words, "--objective.num-grid-steps", "8"]) == 0
    assert "grid of" not in caplog.text


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    _, world, latents = made
    out = tmp_path / "out"

    def refused(*words):
        assert main([str(word) for word in words]) == 2 and not out.exists()
        return capsys.readouterr().err

    assert "needs --data LATENTS" in refused("distill", "wan-consistency", world)
    toy = words_of(world, "toy:32", out)
    assert "holds no latents: write them first (scd encode" in refused(*toy)
    steps = words_of(world, latents, out, "--steps", "1000", "--first-steps", "500")
    assert "first_steps must descend from 1000" in refused(*steps)
    steps = words_of(world, latents, out, "--first-steps", "1000", "500")
    assert "first_times must be more than the 4 steps" in refused(*steps)
    doom = words_of(str(WORLDS / "doom"), latents, out)
    assert "is not a Wan world" in refused(*doom)


def test_a_steered_world_learns_two_steps_and_then_on_its_own_frames(tmp_path, monkeypatch):
    """With actions: the causal start, then matching to the causal teacher on recorded clips."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clips = write_clips(tmp_path / "clips", num_actions=3)
    _, world = write_world(tmp_path / "made", "--actions", clips)
    latents = encode_with(world, clips, tmp_path / "latents")
    start = tmp_path / "start"
    assert main(words_of(world, latents, start, *TWO, "--max-steps", "1")) == 0
    words = ["distill", world, "--data", latents, "--initial", str(start), "--method", "dmd"]
    words += ["--steps", "2", "--num-frames", "3", "--device", "cpu", "--precision", "fp32"]
    words += ["--max-steps", "1", "--sample-every", "0", "--objective.num-given-frames", "1"]
    words += ["--objective.num-critic-updates", "1", "--objective.min-spread", "0", "--out"]
    assert main([*words, str(tmp_path / "two")]) == 0
    two = load_world(tmp_path / "two")
    assert two.sampling == load_world(start).sampling and len(two.sampling.times) == 2
    (event,) = read_log(tmp_path / "two", "step")
    assert event["loss"] > 0 and event["critic_loss"] > 0
