"""`scd.probe.report`: what `scd probe` gives, for any module; and what it warns of."""

import copy
from dataclasses import fields

import pytest
import torch

import scd
from scd.data.clip import Conditions
from scd.evaluation.image import Estimate
from scd.models.checkpoint import load_world
from scd.probing.doubt import loss_of_mean, warnings_of
from scd.probing.measurements import splits
from scd.probing.plan import make_plan, open_clips
from scd.probing.run import probe
from scd.probing.settings import MeasureConfig
from scd.probing.subject import Subject, Task
from tests.probing.test_probe_run import config_of
from tests.probing.test_probe_run import dense as dense


def measured(config):
    return MeasureConfig(**{one.name: getattr(config, one.name) for one in fields(MeasureConfig)})


def test_a_report_is_the_probe_of_the_same_world(dense, tmp_path):
    config = config_of(dense, tmp_path / "probe", num_clips=2, reuse_depths=1, reuse_steps=1)
    expected = probe(config)
    world = load_world(dense)
    plan = make_plan(config, world, open_clips(config, world))
    result = scd.probe.report(
        world.model,
        tmp_path / "report",
        clips=plan.task.clean,
        conditions=plan.task.conditions,
        config=measured(config),
        decode=plan.decode,
    )
    assert set(result) == set(expected)
    for key in ("attention", "step_similarity", "leave_one_out", "reuse", "against_mean"):
        assert result[key] == expected[key], key
    losses = [
        {one["name"]: one["predicted_relative_loss"] for one in found["candidates"]}
        for found in (result, expected)
    ]
    assert losses[0] == losses[1] and result["model"] == expected["model"]
    pages = [(tmp_path / name / "report.html").read_text() for name in ("report", "probe")]
    assert pages[0].count("<h2") == pages[1].count("<h2") and "A DenseDiffuser" in pages[0]


def test_other_weights_and_other_clips_are_not_mixed(dense, tmp_path):
    model = load_world(dense).model
    config = MeasureConfig(measurements=("leave_one_out",), num_steps=2)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(2, 4, 3, 32, 32, generator=generator)
    given = {
        "conditions": Conditions(actions=torch.zeros(2, 4, dtype=torch.long)),
        "config": config,
    }
    out = tmp_path / "out"
    first = scd.probe.report(model, out, clips=clips, **given)
    before = (out / "parts" / "leave_one_out.json").stat().st_mtime_ns
    assert scd.probe.report(model, out, clips=clips, **given)["seconds"] == first["seconds"]
    with pytest.raises(FileExistsError, match="holds another probe: .*clips_hash"):
        scd.probe.report(model, out, clips=clips + 1, **given)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(FileExistsError, match="weights_hash"):
        scd.probe.report(other, out, clips=clips, **given)
    assert (out / "parts" / "leave_one_out.json").stat().st_mtime_ns == before


def test_what_is_no_subject_or_no_clip_of_it_is_refused(dense, tmp_path):
    clips = torch.zeros(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match="needed a Subject, .* got Linear: docs/probing.md"):
        scd.probe.report(torch.nn.Linear(2, 2), tmp_path / "a", clips=clips)
    model = load_world(dense).model
    with pytest.raises(ValueError, match=r"clips must be \[clips, frames, 3, 32, 32\].* 16, 16\]"):
        scd.probe.report(model, tmp_path / "a", clips=clips[..., :16, :16])
    with pytest.raises(ValueError, match="2 or more given frames"):
        scd.probe.report(model, tmp_path / "a", clips=clips[:, :2])
    assert not (tmp_path / "a").exists()


class Guess(Subject):
    """Predicts as the mean does; without attention, all that is asked of it here."""

    tokens_per_frame, grid, frame_shape, num_heads, width = 1, (1, 1), (2, 8, 8), 1, 1
    layers = ()

    def __init__(self, mean, variance):
        self.mean, self.variance = mean, variance

    def begin(self, past, conditions):
        return None

    def velocity(self, state, noisy, time):
        # The clean frame of pixels that are Gaussian, from the noisy one: Wiener's filter.
        kept = (1 - time) * self.variance / ((1 - time) ** 2 * self.variance + time**2)
        clean = self.mean + kept * (noisy - (1 - time) * self.mean)
        return (noisy - clean) / time


def test_the_loss_of_the_mean_is_that_of_the_best_such_guess():
    generator = torch.Generator().manual_seed(3)
    spread = torch.tensor([0.5, 2.0])[:, None, None]
    clean = 0.7 + spread * torch.randn(40, 3, 2, 8, 8, generator=generator)
    task = Task.of(clean, Conditions(), num_noises=2)
    mean = clean.mean((0, 1, 3, 4))[:, None, None]
    variance = (clean - mean).square().mean((0, 1, 3, 4))[:, None, None]
    guess, levels = Guess(mean, variance), (0.2, 0.5, 0.9, 1.0)
    found = loss_of_mean(task, levels)
    for level, row in zip(levels, found, strict=True):
        torch.testing.assert_close(row, task.per_clip(task.error(guess, None, level)))
        formula = (variance / ((1 - level) ** 2 * variance + level**2)).mean()
        torch.testing.assert_close(row.mean(), formula, rtol=0.05, atol=0)
    # A better and a worse guess.
    assert task.error(Guess(mean, 0.5 * variance), None, 0.5).mean() > found[1].mean()


def entry(mean, low, high):
    return {"relative_loss": mean, "ci_low": low, "ci_high": high}


def candidate(mean, low, high):
    return {"with_past": vars(Estimate(mean=mean, ci_low=low, ci_high=high))}


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"against_mean": entry(-0.1, -0.3, 0.01)}, ["predicts no better than the mean"]),
        ({"against_mean": entry(0.2, 0.1, 0.3)}, [r"+20.0 % (+10.0 .. +30.0)"]),
        (
            {"candidates": [candidate(-0.2, -0.3, -0.1), candidate(0.1, 0.0, 0.2)]},
            ["freezing layers improves its loss, in 1 of 2 splits, at best by -20.0 %"],
        ),
        (
            {"leave_one_out": [entry(-0.01, -0.02, -0.005) | {"name": "layer 2"}]},
            ["leaving layers out improves its loss: layer 2 (-1.0 %"],
        ),
    ],
    ids=str,
)
def test_what_is_warned_of(changes, warnings):
    result = {
        "against_mean": entry(-0.6, -0.7, -0.5),
        "candidates": [candidate(-0.01, -0.02, 0.01)],
        "leave_one_out": [entry(-0.01, -0.02, 0.0) | {"name": "layer 1"}],
    }
    found = warnings_of(result | changes)
    assert len(found) == len(warnings)
    for warning, expected in zip(found, warnings, strict=True):
        assert expected in warning


def test_only_what_nothing_speaks_against_is_recommended(dense, tmp_path):
    config = config_of(dense, tmp_path / "out", num_clips=2, measurements=("splits",))
    result = probe(config)
    page = (tmp_path / "out" / "report.html").read_text()
    # Random weights.
    assert result["warnings"] and "may not have learnt enough" in page
    assert "no recommendation: see the warning" in page and "recommended split:" not in page
    trusted = result | {"proposed_split": result["proposed_split"] | {"is_recommended": True}}
    (_, words), _ = splits.cards(trusted)
    assert words == "recommended split: encoder layers, then first + last layers of the decoder"
    assert "no recommendation" not in splits.section(trusted, {})
