"""Inverse dynamics: what it learns, what is refused, and the rows that it adds to an evaluation."""

import json
import math
from dataclasses import replace

import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from scd.cli import main
from scd.data.actions import conditions_of
from scd.data.clip import Batch, Clip, Conditions
from scd.data.source import DataCard, Source
from scd.data.spaces import ConditionSpec
from scd.evaluation import evaluate
from scd.evaluation.frechet import frechet_distance, frechet_estimate
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    ReadActions,
    TrainedInverseDynamics,
    cost_volume,
    error_of,
    load_inverse_dynamics,
    pairs,
    quarters_of,
    save_inverse_dynamics,
)
from scd.evaluation.metrics import (
    AgainstTruth,
    Drift,
    Seams,
    Seen,
    drift_estimates,
    drift_statistics,
    find_row,
    seam_statistics,
)
from scd.evaluation.predict import choose_windows, read_windows
from scd.evaluation.protocols import EvaluateConfig, Protocol
from scd.evaluation.trial import measure
from scd.training import inverse_dynamics as training


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: actions are read from frames alone."""
    return separable_config


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Stripes(Source):
    """Sixty clips of stripes that go left, stay or go right by one pixel, as their action says."""

    card = DataCard(
        height=8,
        width=8,
        fps=10.0,
        conditions=ConditionSpec(num_actions=3),
        action_names=("left", "stay", "right"),
    )
    length = 12

    def __init__(self):
        super().__init__("stripes", "val", self.card, [self.length] * 60)

    def _read(self, episode, start, num_frames):
        draw = generator(episode)
        actions = torch.randint(3, (12,), generator=draw)
        row = torch.rand(3, 1, 8, generator=draw) * 2 - 1
        places = (actions - 1).cumsum(0).tolist()
        frames = torch.stack([row.roll(place, -1).expand(3, 8, 8) for place in places])
        return Clip(frames=frames, actions=actions)[start : start + num_frames]


class Slides(Stripes):
    """The same, told by how far the stripes go."""

    card = replace(
        Stripes.card, conditions=ConditionSpec(action_dim=1), action_names=("to the right",)
    )

    def _read(self, episode, start, num_frames):
        clip = super()._read(episode, start, num_frames)
        return replace(clip, actions=(clip.actions[:, None] - 1) * 5.0 + 100)


def trained(source, tmp_path, monkeypatch, steps=120, name="judge"):
    monkeypatch.setattr(training, "open_source", lambda *_: source)
    # With some seeds so few steps and weights do not yet tell left from right.
    config = training.TrainInverseDynamicsConfig(
        data="d", out=str(tmp_path / name), steps=steps, batch_size=8, width=16, feature_dim=4
    )
    return training.train_inverse_dynamics(replace(config, seed=4, device="cpu"))


def test_it_reads_actions_of_clips_it_has_not_seen(tmp_path, monkeypatch):
    judge = trained(Stripes(), tmp_path, monkeypatch)
    assert judge.held_out["accuracy"]["mean"] > 0.9 > judge.held_out["most_frequent"] + 0.4
    assert "held-out accuracy" in training.readable(judge.held_out)
    written = json.loads((tmp_path / "judge/config.json").read_text())
    assert written["held_out"] == judge.held_out
    assert {"settings", "command", "commit", "hardware"} <= set(written["training"])
    # Features of real frames are in units of their deviation.
    clips = Batch.of([Stripes().read(episode, 0, 12) for episode in range(60)])
    features = judge.network.features(*pairs(clips.frames))
    assert features.std(0).mean().item() == pytest.approx(1, abs=0.15)
    with pytest.raises(FileExistsError, match="is there already"):
        trained(Stripes(), tmp_path, monkeypatch)


def test_the_same_settings_make_the_same_judge(tmp_path, monkeypatch):
    first, again = (trained(Stripes(), tmp_path, monkeypatch, 3, name) for name in ("a", "b"))
    assert first.digest == again.digest != ""


def test_continuous_actions_are_read_by_regression(tmp_path, monkeypatch):
    judge = trained(Slides(), tmp_path, monkeypatch)
    assert judge.held_out["error"]["mean"] < 0.4
    network = judge.network
    features = network.features(*pairs(Slides().read(0, 0, 12).frames[None]))
    mean = network.action_mean.expand(11, 1)
    read, _ = network.readings(features * network.feature_deviation + network.feature_mean)
    assert torch.allclose(network.errors(features, mean), read.square(), atol=1e-5)
    assert network.action_mean.item() == pytest.approx(100, abs=1)
    assert network.action_deviation.item() == pytest.approx(5 * math.sqrt(2 / 3), rel=0.1)


def test_held_out_episodes_that_are_too_short_are_refused_before_training(tmp_path, monkeypatch):
    class Short(Stripes):
        length = 4

    sources = {"train": Stripes(), "val": Short()}
    monkeypatch.setattr(training, "open_source", lambda _data, split, _strict: sources[split])
    monkeypatch.setattr(
        training.InverseDynamicsObjective, "loss", lambda *_: pytest.fail("it trained")
    )
    config = training.TrainInverseDynamicsConfig(
        data="d", out=str(tmp_path / "judge"), device="cpu"
    )
    with pytest.raises(ValueError, match="clips of 5 frames, but the longest val .* d has 4"):
        training.train_inverse_dynamics(config)
    assert not (tmp_path / "judge").exists()


def test_every_weight_learns_and_both_frames_matter():
    judge = InverseDynamics(
        InverseDynamicsConfig(conditions=ConditionSpec(num_actions=3), width=16), 9, 20
    )
    frames = torch.randn(2, 4, 3, 9, 20, generator=generator())
    actions = torch.randint(3, (2, 4), generator=generator())
    batch = Batch(frames=frames, conditions=Conditions(actions=actions))
    loss, _ = training.InverseDynamicsObjective().loss(judge, batch, generator())
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in judge.parameters())
    before, after = pairs(frames)
    seen = judge.raw_features(before, after)
    assert not torch.allclose(seen, judge.raw_features(before.flip(0), after))
    assert not torch.allclose(seen, judge.raw_features(before, after.flip(0)))


def test_cost_volume_is_zero_where_the_shift_is_right():
    before = torch.randn(1, 3, 10, 10, generator=generator())
    volume = cost_volume(before, before.roll((1, -2), (-2, -1)))
    # What is at (y, x) was at (y - 1, x + 2): row 3 - 1, column 3 + 2 of the 7 x 7 shifts.
    best = volume[0, :, 4:6, 4:6].mean((1, 2)).argmin().item()
    assert best == 2 * 7 + 5
    assert volume[0, best, 4:6, 4:6].abs().max() < 1e-6


def test_half_of_the_clips_are_distorted_by_what_is_told():
    frames = torch.randn(64, 2, 3, 8, 8, generator=generator()).clamp(-1, 1)
    distorted, levels = training.distort(frames, generator())
    touched = levels.amax((1, 2)) > 0
    assert 16 < touched.sum() < 48
    assert torch.equal(distorted[~touched], frames[~touched])
    apart = (distorted - frames).square().mean((2, 3, 4))
    assert apart[levels.sum(-1) > 1.2].mean() > 4 * apart[(levels.sum(-1) < 0.5)].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": ConditionSpec(num_labels=2)}, "inverse dynamics reads actions"),
        ({"width": 24}, "width must be a multiple of 16, got 24"),
        ({"feature_dim": 0}, "feature_dim must be 1 or more, got 0"),
    ],
)
def test_settings_that_make_no_judge_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InverseDynamicsConfig(**changes)
    with pytest.raises(ValueError, match="8x8 or more, got 8x6"):
        InverseDynamics(InverseDynamicsConfig(), 8, 6)


def untrained(card, feature_dim=4):
    torch.manual_seed(0)
    config = InverseDynamicsConfig(conditions=card.conditions, width=16, feature_dim=feature_dim)
    network = InverseDynamics(config, card.height, card.width).eval().requires_grad_(False)
    return TrainedInverseDynamics(network=network, card=card, held_out={})


def test_damaged_or_foreign_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="needed the folder of an inverse dynamics model"):
        load_inverse_dynamics(tmp_path)
    save_inverse_dynamics(untrained(Stripes.card), tmp_path / "judge", {})
    file = tmp_path / "judge/config.json"
    values = json.loads(file.read_text())
    for broken, message in (
        ("{", "is not JSON"),
        ("[]", "needed format 'scd-judge-1', got None"),
        (json.dumps(values | {"format": "scd-1"}), "needed format 'scd-judge-1', got 'scd-1'"),
        (json.dumps({"format": "scd-judge-1"}), "missing fields"),
        (json.dumps(values | {"judge": values["judge"] | {"width": 32}}), "another architecture"),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match=message):
            load_inverse_dynamics(tmp_path / "judge")


def test_a_judge_of_other_data_is_refused(run, folder, tmp_path, toy_source, capsys):
    card = replace(toy_source.card, fps=5.0)
    save_inverse_dynamics(untrained(card), tmp_path / "judge", {})
    flags = ["--data", folder, "--judge", str(tmp_path / "judge"), "--device", "cpu"]
    assert main(["evaluate", run, *flags, "--out", str(tmp_path / "e.json")]) == 2
    errors = capsys.readouterr().err
    assert "inverse dynamics model was trained on data with other fps: {'fps': 5.0}" in errors


def test_what_is_said_to_players_makes_no_other_data(toy_source):
    card = toy_source.card
    untrained(card).check_fit(replace(card, pixel_art=True, key_map=card.keys), "clips")
    with pytest.raises(ValueError, match="other fps:"):
        untrained(card).check_fit(replace(card, fps=2 * card.fps, pixel_art=True), "clips")


def test_rows_are_the_judge_read_by_hand(tiny_world, toy_source, tmp_path):
    judge = untrained(toy_source.card)
    protocol = Protocol(context=2, horizon=5, num_clips=9, batch_size=5, memory=False)
    metrics = [AgainstTruth(protocol), Drift(protocol), ReadActions(protocol, judge)]
    measured = measure(tiny_world, toy_source, protocol, metrics)
    found = {
        (row["metric"], row["baseline"], row.get("horizon")): row["mean"]
        for row in measured.rows + measured.overall
    }
    baselines = ("model", "shuffled_actions", "truth", "unsteered")
    for name in baselines:
        steps = [found["control", name, horizon] for horizon in range(1, 6)]
        assert found["control", name, None] == pytest.approx(sum(steps) / 5)
    windows = choose_windows(toy_source, 9, 7, 0)
    batch = read_windows(toy_source, windows, 7)
    before, after = batch.frames[:, 3], batch.frames[:, 4]
    features = judge.network.features(before, after)
    errors = judge.network.errors(features, batch.conditions.actions[:, 4])
    assert found["control", "truth", 3] == pytest.approx(1 - errors.mean().item())
    distances = {key[1:] for key in found if key[0] == "frechet_own"}
    assert distances == {
        (name, horizon)
        for name in ("model", "repeat_last", "shuffled_actions")
        for horizon in (1, 2, 3, 5, None)
    }


def test_too_few_clips_for_a_distance_are_said(run, folder, tmp_path, toy_source, no_pictures):
    save_inverse_dynamics(untrained(toy_source.card, feature_dim=8), tmp_path / "judge", {})
    config = EvaluateConfig(
        run=run,
        data=folder,
        protocol=Protocol(context=2, horizon=2, num_clips=5),
        judge=str(tmp_path / "judge"),
        device="cpu",
        out=str(tmp_path / "e.json"),
    )
    result = evaluate.evaluate(config)
    reason = "needs 16 clips with this inverse dynamics model, got 5"
    assert result["left_out"] == {"frechet_own": reason}
    assert find_row(result["rows"], "control", 2)["mean"] <= 1
    assert len(result["judge"]["digest"]) == 16
    assert "control         unsteered" in evaluate.readable(result)


def measured_on_the_truth(judge, clips):
    """Return the metric, and what it measures where a model predicts what happened."""
    seen = Seen(
        predicted=clips.frames,
        true=clips.frames,
        context=1,
        steering=clips.conditions.frames(1, None),
        shuffled=False,
        is_first=True,
    )
    metric = ReadActions(Protocol(horizon=5), judge)
    measured = {
        name: {key: value[:, None] for key, value in numbers.items()}
        for name, numbers in metric.measure(seen).items()
    }
    return metric, measured


def test_the_truth_has_no_distance_and_ideal_drift():
    torch.manual_seed(0)
    judge = untrained(Stripes.card)
    clips = Batch.of([Stripes().read(episode, 0, 6) for episode in range(12)])
    true = clips.frames[:, 1:]
    metric, measured = measured_on_the_truth(judge, clips)
    rows = metric.estimates(measured)
    found = [(name, one) for _, kind, name, one in rows if kind == "frechet_own"]
    assert [name for name, _ in found] == ["model"] * 5 + ["repeat_last"] * 5
    for name, distance in found:
        if name == "model":
            assert distance.mean == pytest.approx(0, abs=1e-6)
        else:
            assert 0 < distance.mean
            assert distance.ci_low <= distance.mean <= distance.ci_high
    statistics = drift_statistics(true)
    drift = drift_estimates(statistics, statistics)
    assert [drift[name].mean for name in ("sharpness", "contrast", "brightness")] == [1, 1, 0]


def test_drift_statistics_of_pictures_that_are_known():
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    frames = (checks * 1.0 - 0.5).expand(1, 1, 3, 8, 8)
    looks = {name: value.item() for name, value in drift_statistics(frames).items()}
    assert looks == {"detail": 1.0, "deviation": 0.5, "level": 0.0}
    faded = drift_estimates(drift_statistics(0.25 * frames + 0.1), drift_statistics(frames))
    assert faded["sharpness"].mean == pytest.approx(0.25)
    assert faded["contrast"].mean == pytest.approx(0.25)
    assert faded["brightness"].mean == pytest.approx(0.1)
    flat = drift_estimates(drift_statistics(0 * frames), drift_statistics(0 * frames))
    assert flat["sharpness"].mean == 1


def test_seams_of_pictures_that_are_known():
    # Cells of 4 x 2 pixels, each of one grey: 0.5 apart side by side, 0.25 one below the other.
    cells = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.75, 0.25]])
    tiles = cells.repeat_interleave(4, 0).repeat_interleave(2, 1).expand(1, 1, 3, 8, 6)
    looks = {name: value.item() for name, value in seam_statistics(tiles, 2, 3).items()}
    # By pixels of the grid: 2 borders of columns, 1 of rows.
    assert looks == pytest.approx({"across": (2 * 0.5 + 0.25) / 3, "within": 0.0})
    ramp = (torch.arange(8.0)[:, None] + torch.arange(6.0)).expand(1, 1, 3, 8, 6) / 10
    even = {name: value.item() for name, value in seam_statistics(ramp, 2, 3).items()}
    assert even == pytest.approx({"across": 0.1, "within": 0.1})
    metric = Seams(Protocol(context=1, horizon=1), 2, 3)

    def seams(made, true):
        sides = {"model": made, "truth": true}
        found = {name: seam_statistics(one, 2, 3) for name, one in sides.items()}
        measured = {name: {k: v[:, None] for k, v in one.items()} for name, one in found.items()}
        return [one.mean for *_, one in metric.estimates(measured)]

    # The same for the frame and for all together; how much contrast there is does not matter.
    assert seams(ramp, ramp) == seams(0.3 * ramp, ramp) == pytest.approx([1.0, 1.0])
    assert seams(ramp + tiles, ramp)[0] == pytest.approx((0.6 + 0.4 + 0.35) / 3 / 0.1)
    assert seams(0 * ramp, 0 * ramp) == [1.0, 1.0]


def test_distance_of_gaussians_that_are_known():
    zero, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    moved = zero + torch.tensor([3.0, 4.0])
    assert frechet_distance(zero, one, moved, one).item() == pytest.approx(25)
    # Equal axes: the squared differences of the deviations add up.
    wide = torch.tensor([[4.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    assert frechet_distance(zero, one, zero, wide).item() == pytest.approx(1 + 4)
    flat = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert frechet_distance(zero, flat, zero, one).item() == pytest.approx(1 + 1)


def test_distance_is_the_formula_with_a_general_root():
    """The eigenvalues of the product itself, which is not symmetric."""
    draws = torch.randn(2, 40, 5, dtype=torch.float64, generator=generator())
    skewed = draws @ torch.randn(5, 5, dtype=torch.float64, generator=generator(1)) + 1
    means = (draws[0].mean(0), skewed[1].mean(0))
    covariances = (draws[0].T.cov(), skewed[1].T.cov())
    shared = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    by_hand = (means[0] - means[1]).square().sum() - 2 * shared
    by_hand += covariances[0].trace() + covariances[1].trace()
    found = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-8)
    back = frechet_distance(means[1], covariances[1], means[0], covariances[0])
    assert back.item() == pytest.approx(found.item(), rel=1e-8)


def test_estimate_is_the_distance_of_all_frames_and_its_interval_narrows():
    widths = {}
    for num_clips in (20, 500):
        features = torch.randn(num_clips, 3, 2, generator=generator())
        other = 2 * torch.randn(num_clips, 3, 2, generator=generator(1))
        found = frechet_estimate(features, other)
        moments = []
        for values in (features, other):
            flat = values.flatten(0, 1).double()
            moments += [flat.mean(0), flat.T.cov(correction=0)]
        assert found.mean == pytest.approx(frechet_distance(*moments).item(), rel=1e-8)
        assert found.ci_low < found.mean < found.ci_high
        # Several predictions of each clip against its one truth.
        twice = frechet_estimate(features.repeat(1, 2, 1), other)
        assert twice.mean == pytest.approx(found.mean, rel=1e-8)
        widths[num_clips] = found.ci_high - found.ci_low
    # Two axes, deviations 1 and 2.
    assert found.mean == pytest.approx(2, rel=0.15)
    assert widths[500] < widths[20] / 2.5


@pytest.mark.parametrize(
    ("horizon", "ends"), [(1, [1]), (3, [1, 2, 3]), (8, [2, 4, 6, 8]), (9, [2, 4, 6, 9])]
)
def test_quarters_of_a_horizon(horizon, ends):
    parts = quarters_of(horizon)
    assert [part.stop for part in parts] == ends
    assert [part.start for part in parts] == [0, *ends[:-1]]


def test_command_line(folder, tmp_path, capsys):
    flags = ["--steps", "1", "--batch-size", "1", "--width", "16", "--device", "cpu"]
    assert main(["train-judge", "--data", folder, "--out", str(tmp_path / "j"), *flags]) == 2
    assert "split 'train' has no readable episodes" in capsys.readouterr().err
    assert not (tmp_path / "j").exists()


class Parted(Stripes):
    """The same, told by keys (left, right), a mode that nothing shows, and how far, times 5."""

    space = Dict(
        {
            "keys": MultiBinary(2),
            "mode": Discrete(3),
            "way": Box(-10.0, 10.0, (1,)),
        }
    )
    card = replace(
        Stripes.card,
        conditions=conditions_of(space, {"keys": ("left", "right")}),
        action_names=("left", "right", "mode", "way_0"),
    )

    def _read(self, episode, start, num_frames):
        clip = super()._read(episode, start, num_frames)
        way = clip.actions - 1
        mode = torch.randint(3, (12,), generator=generator(1000 + episode))
        mode = mode[start : start + num_frames]
        vector = torch.stack([way < 0, way > 0, mode, 5 * way], dim=1).float()
        return replace(clip, actions=vector)


def test_every_part_of_an_action_is_read_for_itself(tmp_path, monkeypatch):
    judge = trained(Parted(), tmp_path, monkeypatch, steps=150)
    parts = judge.held_out["parts"]
    assert list(parts) == ["keys", "mode", "way"]
    assert parts["keys"]["accuracy"]["mean"] > parts["keys"]["most_frequent"] + 0.1
    # Nothing of the mode can be seen.
    assert parts["mode"]["accuracy"]["mean"] < 0.5
    assert parts["way"]["error"]["mean"] < 0.4
    said = training.readable(judge.held_out).splitlines()
    assert [line.partition(" [")[0].split()[1:4:2] for line in said] == [
        ["accuracy", "keys"], ["accuracy", "mode"], ["error", "way"]]  # fmt: skip
    # Keys and choices stay as they are; values are in units of their spread.
    network = judge.network
    assert network.action_mean[:3].tolist() == [0, 0, 0]
    assert network.action_deviation[:3].tolist() == [1, 1, 1]
    assert network.action_deviation[3].item() == pytest.approx(5 * math.sqrt(2 / 3), rel=0.1)
    # By hand: 2 keys, 3 choices, 1 value.
    clip = Parted().read(0, 0, 12)
    features = network.features(*pairs(clip.frames[None]))
    read, _ = network.readings(features * network.feature_deviation + network.feature_mean)
    actions = clip.actions[1:]
    value = (actions[:, 3] - network.action_mean[3]) / network.action_deviation[3]
    by_hand = torch.stack(
        [
            ((read[:, :2] > 0).float() - actions[:, :2]).abs().mean(1),
            (read[:, 2:5].argmax(1) != actions[:, 2]).float(),
            (read[:, 5] - value).square(),
        ],
        dim=1,
    )
    assert torch.allclose(network.errors(features, actions), by_hand, atol=1e-5)
    losses = network.losses(read, actions)
    assert losses[0] == binary_cross_entropy_with_logits(read[:, :2], actions[:, :2])
    assert losses[1] == cross_entropy(read[:, 2:5], actions[:, 2].long())
    assert losses[2].item() == pytest.approx(by_hand[:, 2].mean().item(), rel=1e-5)


def test_an_evaluation_has_rows_for_every_part():
    judge = untrained(Parted.card)
    clips = Batch.of([Parted().read(episode, 0, 6) for episode in range(12)])
    metric, measured = measured_on_the_truth(judge, clips)
    rows = {
        (kind, horizon): one.mean
        for horizon, kind, name, one in metric.estimates(measured)
        if name == "model" and kind.startswith("control")
    }
    names = {"control", "control/keys", "control/mode", "control_error", "control_error/way"}
    assert set(rows) == {(name, horizon) for name in names for horizon in (1, 2, 3, 4, 5, None)}
    errors = judge.network.errors(
        judge.network.features(*pairs(clips.frames)), clips.conditions.actions[:, 1:].flatten(0, 1)
    ).mean(0)
    assert rows["control/keys", None] == pytest.approx(1 - errors[0].item())
    assert rows["control/mode", None] == pytest.approx(1 - errors[1].item())
    assert rows["control_error/way", None] == pytest.approx(errors[2].item())
    assert rows["control", None] == pytest.approx(1 - errors[:2].mean().item())
    assert rows["control_error", None] == rows["control_error/way", None]
    assert metric.by_clip(measured)["action_error"].shape == (12, 1)


def test_choices_in_several_entries_are_read_each_by_its_own():
    spec = conditions_of(MultiDiscrete([2, 3]))
    judge = InverseDynamics(InverseDynamicsConfig(conditions=spec, width=16), 8, 8)
    read = torch.tensor([[9.0, 0, 0, 9, 0], [0, 9, 9, 0, 0]])
    actions = torch.tensor([[0.0, 1], [1, 2]])
    ((part, outputs, entries),) = judge.by_part(read, actions)
    assert error_of(part, outputs, entries).tolist() == [0, 0.5]
    assert judge.losses(read, actions).item() == pytest.approx(
        (cross_entropy(read[:, :2], actions[:, 0].long())
        + cross_entropy(read[:, 2:], actions[:, 1].long())).item() / 2
    )  # fmt: skip
