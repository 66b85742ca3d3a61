"""Evaluation by a named protocol: against today's evaluation, by hand, resumed, over processes."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scd.cli import main
from scd.common.published_weights import shipped_heads
from scd.data.source import open_source
from scd.evaluation import evaluate, fvd, image, predict
from scd.evaluation import report as protocol_page
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    ReadActions,
    TrainedInverseDynamics,
    load_inverse_dynamics,
    save_inverse_dynamics,
)
from scd.evaluation.lpips import LAYERS, load_lpips
from scd.evaluation.metrics import AgainstTruth, Drift, Seams
from scd.evaluation.protocols import PROTOCOLS, EvaluateConfig, Protocol
from scd.evaluation.trial import Trial, Unit, measure, through_h264
from scd.models.checkpoint import load_world, save_world
from scd.models.config import Guidance


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: evaluation sees both through the same rollout."""
    return separable_config


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Picture, page and intervals take longer than the evaluations; other tests see them."""
    monkeypatch.setattr(evaluate, "plot_metrics", lambda *_: None)
    monkeypatch.setattr(evaluate, "write_report", lambda *_: None)
    monkeypatch.setattr(image, "NUM_RESAMPLES", 20)
    monkeypatch.setattr(fvd, "NUM_RESAMPLES", 20)


def small(**changes):
    values = dict(context=2, horizon=3, num_clips=5, batch_size=2, num_trajectories=2)
    return replace(PROTOCOLS["toy-8-8"], **{**values, **changes})


def settings(run, folder, tmp_path, protocol=None, **changes):
    values = dict(run=run, data=folder, out=str(tmp_path / "e.json"), device="cpu")
    return EvaluateConfig(protocol=protocol or small(), **{**values, **changes})


def evaluated(*arguments, **changes):
    result = evaluate.evaluate(settings(*arguments, **changes))
    assert result is not None
    return result


def numbers(rows):
    return {
        (row["metric"], row["baseline"], row.get("horizon")): (
            row["mean"],
            row["ci_low"],
            row["ci_high"],
        )
        for row in rows
    }


@pytest.fixture
def judge(toy_source, tmp_path):
    torch.manual_seed(0)
    config = InverseDynamicsConfig(conditions=toy_source.card.conditions, width=16, feature_dim=2)
    network = InverseDynamics(config, 32, 32).eval()
    made = TrainedInverseDynamics(network=network, card=toy_source.card, held_out={})
    save_inverse_dynamics(made, tmp_path / "judge", {})
    return str(tmp_path / "judge")


class Pooling(nn.Module):
    """Stands where StyleGAN-V's network stands: 400 numbers that differ from clip to clip."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return nn.functional.adaptive_avg_pool3d(x, (4, 8, 8)).flatten(1)[:, :400]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def i3d(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.script(Pooling()).save(str(path))
    return {"i3d": str(path), "i3d_sha256": sha256(path)}


@pytest.fixture
def alexnet(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, given, made, kernel, *_ in LAYERS:
        state[f"features.{number}.weight"] = 0.05 * torch.randn(
            made, given, kernel, kernel, generator=generator
        )
        state[f"features.{number}.bias"] = torch.zeros(made)
    path = tmp_path / "alexnet.pth"
    torch.save(state, path)
    return {"alexnet": str(path), "alexnet_sha256": sha256(path)}


def trial_of(run, folder, protocol):
    # Loaded as the evaluation loads it: elsewhere in memory sums may round in another way, and
    # H.264 makes more of that.
    world = load_world(run)
    source = open_source(folder, protocol.split)
    windows = predict.choose_windows(source, protocol.num_clips, protocol.num_frames, protocol.seed)
    return Trial(
        world=world,
        source=source,
        windows=windows,
        protocol=protocol,
        metrics=[AgainstTruth(protocol), Drift(protocol)],
    )


def rolled_out(trial, trajectory):
    """All clips of one trajectory: predicted frames and whole true clips."""
    parts = [
        trial.roll_out(Unit(batch, trajectory)) for batch in range(len(trial.protocol.batches()))
    ]
    return torch.cat([part.frames for part in parts]), torch.cat([p.batch.frames for p in parts])


def test_one_trajectory_of_spread_clips_is_the_evaluation_without_a_name(
    tiny_world, run, folder, judge, tmp_path
):
    result = evaluated(run, folder, tmp_path, small(num_trajectories=1), judge=judge)
    protocol = Protocol(context=2, horizon=3, num_clips=5, batch_size=2)
    reader = load_inverse_dynamics(judge)
    shape = tiny_world.model.config.shape
    metrics = [
        AgainstTruth(protocol),
        Drift(protocol),
        Seams(protocol, shape.rows, shape.columns),
        ReadActions(protocol, reader),
    ]
    plain = measure(tiny_world, open_source(folder, "val"), protocol, metrics)
    for here, there in ((result["rows"], plain.rows), (result["overall"], plain.overall)):
        found, expected = numbers(here), numbers(there)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    assert ("frechet_own", "model", None) in numbers(result["overall"])
    assert ("control", "unsteered", 1) in numbers(result["rows"])
    about = {"protocol": "toy-8-8", "num_clips": 5, "num_trajectories": 1}
    estimate = {"metric", "baseline", "mean", "ci_low", "ci_high"} | set(about)
    assert all(set(row) == estimate | {"horizon"} for row in result["rows"])
    assert all(row.items() >= about.items() for row in result["rows"] + result["overall"])


def test_result_file_and_page_say_everything(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "write_report", protocol_page.write_report)
    result = evaluated(run, folder, tmp_path)
    written = json.loads((tmp_path / "e.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written["protocol"] == "toy-8-8" and "num_clips: 64, 5" in written["changed"]
    assert {"command", "commit", "hardware", "settings", "timed", "model"} <= set(written)
    # Two full batches, two trajectories, three frames; the last batch is smaller.
    assert written["seconds_per_frame"]["total"]["mean"] > 0
    assert [set(clip) for clip in written["clips"]] == [{"episode", "start", "values"}] * 5
    assert all(len(clip["values"]["mse"]) == 2 for clip in written["clips"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("data", "e.html", "e.json", "world"),
    ]
    page = (tmp_path / "e.html").read_text()
    assert page.count('src="data:video/mp4;base64,') == 3
    for text in ("best of 5 clips by psnr_per_frame", "median of", "worst of", "fvd_sets", "h264"):
        assert text in page
    assert "num_clips: 64, 5 (protocol, here)" in page
    table = evaluate.readable(result)
    assert table.startswith("toy-8-8: 5 clips, 2 trajectories each (mean), 2 given and 3 pred")
    assert "changed: context: 8, 2" in table and "ssim" in table


def test_a_world_is_known_by_its_weights_in_one_file_or_in_several(
    tiny_world, run, folder, tmp_path, monkeypatch
):
    device, large = torch.device("cpu"), tmp_path / "large"
    about = evaluate.prepare(settings(run, folder, tmp_path), device).about
    assert about["world"] == sha256(Path(run) / "model.safetensors")
    monkeypatch.setattr("scd.models.checkpoint.SHARD_BYTES", 20_000)
    save_world(tiny_world, large)
    files = [path.read_bytes() for path in sorted(large.glob("model-*.safetensors"))]
    about = evaluate.prepare(settings(str(large), folder, tmp_path), device).about
    assert len(files) > 1 and about["world"] == hashlib.sha256(b"".join(files)).hexdigest()


def test_trajectories_differ_and_their_mean_is_taken(run, folder, tmp_path):
    result = evaluated(run, folder, tmp_path)
    trial = trial_of(run, folder, small())
    errors = []
    for trajectory in range(2):
        predicted, true = rolled_out(trial, trajectory)
        errors.append((predicted - true[:, 2:]).square().mean(dim=(1, 2, 3, 4)))
    assert not torch.allclose(errors[0], errors[1], rtol=1e-3)
    by_clip = torch.tensor([clip["values"]["mse"] for clip in result["clips"]])
    torch.testing.assert_close(by_clip, torch.stack(errors, 1), rtol=1e-4, atol=1e-6)
    found = numbers(result["overall"])["mse", "model", None][0]
    assert found == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_the_best_trajectory_is_chosen_for_each_metric_by_itself(run, folder, tmp_path):
    result = evaluated(run, folder, tmp_path, small(trajectories="best"))
    found = numbers(result["overall"])
    for metric, choose in (("mse", min), ("psnr_per_frame", max), ("ssim", max)):
        values = [choose(clip["values"][metric]) for clip in result["clips"]]
        assert found[metric, "model", None][0] == pytest.approx(sum(values) / 5, rel=1e-5)
        rows = [
            row for row in result["rows"] if (row["metric"], row["baseline"]) == (metric, "model")
        ]
        assert sum(row["mean"] for row in rows) / 3 == pytest.approx(sum(values) / 5, rel=1e-5)
    mistaken = evaluated(
        run,
        folder,
        tmp_path,
        small(trajectories="best", mse_trajectory="highest"),
        out=str(tmp_path / "mistaken.json"),
    )
    values = [max(clip["values"]["mse"]) for clip in mistaken["clips"]]
    other = numbers(mistaken["overall"])
    assert other["mse", "model", None][0] == pytest.approx(sum(values) / 5, rel=1e-5)
    assert other["ssim", "model", None] == found["ssim", "model", None]


def test_the_quirks_of_the_published_evaluation_by_hand(run, folder, i3d, alexnet, tmp_path):
    """FAR's way: H.264, best of n by metric, LPIPS of [0, 1], FVD of all frames per trajectory."""
    published = small(
        horizon=10,
        num_clips=3,
        shuffled_actions=False,
        trajectories="best",
        mse_trajectory="highest",
        lpips=True,
        fvd=True,
        fvd_frames="all",
        fvd_context="reconstructed",
        h264=True,
    )
    result = evaluated(run, folder, tmp_path, published, **i3d, **alexnet)
    found = numbers(result["overall"])
    trial = trial_of(run, folder, published)
    network = load_lpips(alexnet["alexnet"], shipped_heads())
    detector = fvd.load_i3d(i3d["i3d"], "stylegan-v", torch.device("cpu"))
    values: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "unit", "signed")}
    distances = []
    for trajectory in range(2):
        predicted, true = rolled_out(trial, trajectory)
        # The autoencoder of the tiny world is the identity.
        whole = torch.cat([true[:, :2], predicted], dim=1)
        both = [through_h264(*clip) for clip in zip(whole, true, strict=True)]
        made, real = (torch.stack(side) for side in zip(*both, strict=True))
        seen = made[:, 2:], real[:, 2:]
        values["psnr"].append(image.psnr_of(image.mse(*seen)).mean(1))
        values["ssim"].append(image.ssim(*seen).mean(1))
        values["unit"].append(network(*seen, "unit").mean(1))
        values["signed"].append(network(*seen, "signed").mean(1))
        features = [detector.features(side)[:, None] for side in (made, real)]
        distances.append(fvd.fvd(features[0], features[1]))
    best = {name: torch.stack(each) for name, each in values.items()}
    for metric, expected in (
        ("psnr_per_frame", best["psnr"].amax(0)),
        ("ssim", best["ssim"].amax(0)),
        ("lpips_unit", best["unit"].amin(0)),
        ("lpips", best["signed"].amin(0)),
    ):
        mean = expected.mean().item()
        assert found[metric, "model", None][0] == pytest.approx(mean, rel=1e-4), metric
    assert found["fvd", "model", None][0] == pytest.approx(sum(distances) / 2, rel=1e-4)
    assert found["fvd", "model", None] == numbers(result["rows"])["fvd", "model", 10]
    assert found["lpips", "model", None][0] != pytest.approx(found["lpips_unit", "model", None][0])
    assert result["weights"] == {
        "alexnet": alexnet["alexnet_sha256"],
        "lpips_heads": sha256(shipped_heads()),
        "i3d": i3d["i3d_sha256"],
    }


def test_fvd_of_predicted_frames_pools_trajectories_if_asked(run, folder, i3d, tmp_path):
    base = small(horizon=10, num_clips=3, fvd=True, shuffled_actions=False)
    trial = trial_of(run, folder, base)
    detector = fvd.load_i3d(i3d["i3d"], "stylegan-v", torch.device("cpu"))
    clips = [rolled_out(trial, trajectory) for trajectory in range(2)]
    made = torch.stack([detector.features(predicted) for predicted, _ in clips], 1)
    true = detector.features(clips[0][1][:, 2:])[:, None].expand_as(made)
    for sets in ("each", "pooled"):
        out = str(tmp_path / f"{sets}.json")
        result = evaluated(run, folder, tmp_path, replace(base, fvd_sets=sets), out=out, **i3d)
        found = numbers(result["overall"])["fvd", "model", None]
        assert found[0] == pytest.approx(fvd.fvd(made, true, sets), rel=1e-4)
        assert found[1] < found[0] < found[2]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"horizon": 3}, "FVD needs clips of at least 10 frames, this protocol gives it 3"),
        ({"horizon": 10, "num_clips": 1}, "FVD needs two clips or more, got 1"),
    ],
)
def test_without_fvd_the_rest_is_measured_and_it_is_said(
    changed, reason, run, folder, tmp_path, capsys
):
    result = evaluated(run, folder, tmp_path, small(fvd=True, num_trajectories=1, **changed))
    assert result["left_out"]["fvd"] == reason and "i3d" not in result["weights"]
    assert f"without fvd: {reason}" in evaluate.readable(result)
    metrics = {row["metric"] for row in result["rows"]}
    assert "psnr" in metrics and "fvd" not in metrics


def test_clips_from_nothing_are_compared_as_a_set(run, folder, i3d, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "write_report", protocol_page.write_report)
    base = small(context=0, horizon=10, num_clips=3, fvd=True, shuffled_actions=False)
    base = replace(base, num_trajectories=1)
    result = evaluated(run, folder, tmp_path, base, **i3d)
    trial = trial_of(run, folder, base)
    made, true = rolled_out(trial, 0)
    assert made.shape[1] == 10 and torch.equal(true, true.clamp(-1, 1))
    # Nothing of the clips but their actions is given: other frames under them change nothing.
    batch = predict.read_windows(trial.source, trial.windows[:2], 10)
    other = replace(batch, frames=-batch.frames)
    first, again = (predict.predict(trial.world, one, 0).frames for one in (batch, other))
    assert torch.equal(first, again) and torch.equal(first, made[:2])
    detector = fvd.load_i3d(i3d["i3d"], "stylegan-v", torch.device("cpu"))
    sides = [detector.features(clips)[:, None] for clips in (made, true)]
    found = numbers(result["overall"])
    assert found["fvd", "model", None][0] == pytest.approx(fvd.fvd(*sides, "each"), rel=1e-4)
    measured = {row["metric"] for row in result["rows"]}
    assert measured == {"fvd", "sharpness", "contrast", "brightness", "seams"}
    assert "no frame has one truth" in str(result["left_out"])
    assert [clip["values"] for clip in result["clips"]] == [{}] * 3
    page = (tmp_path / "e.html").read_text()
    assert page.count('src="data:video/mp4;base64,') == 3 and "not a pair" in page


def test_an_interrupted_evaluation_goes_on_where_it_was(run, folder, tmp_path, monkeypatch):
    whole = evaluated(run, folder, tmp_path, out=str(tmp_path / "whole.json"))
    measured, honest = [], Trial.measure

    def interrupted(self, unit):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(unit)
        return honest(self, unit)

    monkeypatch.setattr(Trial, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, folder, tmp_path)
    parts = tmp_path / "e.parts"
    assert len(list(parts.glob("*.safetensors"))) == 4 and not (tmp_path / "e.json").exists()
    # One of them is damaged, as by a full disk: it is measured again.
    (parts / f"{measured[1].name}.safetensors").write_bytes(b"cut off")
    again = []
    monkeypatch.setattr(
        Trial, "measure", lambda self, unit: again.append(unit) or honest(self, unit)
    )
    result = evaluated(run, folder, tmp_path)
    # Three batches of two trajectories and one with another clip's actions.
    assert len(again) == 9 - 3 and measured[1] in again
    assert result["rows"] == whole["rows"] and result["clips"] == whole["clips"]
    assert not parts.exists()


def test_a_finished_evaluation_is_read_and_another_one_is_measured(
    run, folder, tmp_path, monkeypatch
):
    few = small(num_clips=2, num_trajectories=1, shuffled_actions=False)
    first = evaluated(run, folder, tmp_path, few)
    honest = Trial.measure

    def refuse(self, unit):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(Trial, "measure", refuse)
    assert evaluated(run, folder, tmp_path, few) == json.loads(json.dumps(first))
    # Other words for the same clips are the same evaluation.
    monkeypatch.chdir(tmp_path)
    assert evaluated(run, "data", tmp_path, few)["rows"] == first["rows"]
    monkeypatch.setattr(Trial, "measure", honest)
    before = (tmp_path / "e.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"e.json holds another result: .*num_steps: "):
        evaluated(run, folder, tmp_path, few, num_steps=1)
    assert (tmp_path / "e.json").read_bytes() == before
    other = evaluated(run, folder, tmp_path, few, num_steps=1, out=str(tmp_path / "f.json"))
    assert other["rows"] != first["rows"]
    config = Path(run) / "config.json"
    settings = json.loads(config.read_text())
    settings["autoencoder"]["std"] *= 2
    config.write_text(json.dumps(settings))
    with pytest.raises(FileExistsError, match=r"e.json holds another result: .*autoencoder: "):
        evaluated(run, folder, tmp_path, few)
    (tmp_path / "e.json").write_text("[1]")
    with pytest.raises(FileExistsError, match="then and now: no result of scd evaluate"):
        evaluated(run, folder, tmp_path, few)


def test_results_lie_in_the_run_and_none_is_lost(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = small(num_clips=2, num_trajectories=1, shuffled_actions=False)

    def place(protocol=few, **changes):
        return evaluated(run, folder, tmp_path, protocol, out="", **changes)["settings"]["out"]

    assert place() == f"{run}/evaluation-toy-8-8.json"
    assert place(num_steps=1) == f"{run}/evaluation-toy-8-8-2.json"
    assert place() == f"{run}/evaluation-toy-8-8.json"
    assert place(replace(few, name="custom")) == f"{run}/evaluation.json"
    honest = Trial.measure

    def one(self, unit):
        if unit.batch:
            raise KeyboardInterrupt
        return honest(self, unit)

    # Parts keep their name for the evaluation that they belong to.
    monkeypatch.setattr(Trial, "measure", one)
    with pytest.raises(KeyboardInterrupt):
        place(small())
    monkeypatch.setattr(Trial, "measure", honest)
    assert place(replace(few, seed=3)) == f"{run}/evaluation-toy-8-8-4.json"
    assert place(small()) == f"{run}/evaluation-toy-8-8-3.json"
    # A run was moved, and its results with it.
    moved = Path(run).rename(tmp_path / "moved")
    again = evaluated(str(moved), folder, tmp_path, few, out="")
    assert again["settings"]["out"] == f"{moved}/evaluation-toy-8-8.json"


def test_parts_of_another_evaluation_are_not_mixed_in(run, folder, tmp_path, monkeypatch):
    honest = Trial.measure

    def one(self, unit):
        if unit.batch:
            raise KeyboardInterrupt
        return honest(self, unit)

    monkeypatch.setattr(Trial, "measure", one)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, folder, tmp_path)
    with pytest.raises(ValueError, match=r"e.parts holds parts of another .* protocol.seed: 0, 1"):
        evaluated(run, folder, tmp_path, small(seed=1))
    (tmp_path / "e.parts" / "about.json").unlink()
    with pytest.raises(ValueError, match="holds parts, but no about.json: remove it"):
        evaluated(run, folder, tmp_path)


def test_parts_appear_whole(tmp_path):
    parts = evaluate.Parts(tmp_path / "parts")
    parts.open({"seed": 0})
    parts.open({"seed": 0})
    assert parts.missing(["a", "b"]) == ["a", "b"]
    parts.write("a", {"values.model.mse": torch.arange(3.0)})
    assert parts.missing(["a", "b"]) == ["b"]
    assert parts.read("a")["values.model.mse"].tolist() == [0, 1, 2]
    assert load_file(tmp_path / "parts" / "a.safetensors").keys() == {"values.model.mse"}


def test_other_steps_and_guidance_reach_the_rollout(run, folder, tmp_path):
    few = small(num_clips=2, num_trajectories=1, shuffled_actions=False)
    plain = evaluated(run, folder, tmp_path, few)
    guided = evaluated(
        run,
        folder,
        tmp_path,
        few,
        guidance=Guidance(kind="context_noise", scale=1.5),
        out=str(tmp_path / "guided.json"),
    )
    assert plain["rows"] != guided["rows"]
    assert guided["about"]["guidance"]["scale"] == 1.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--protocol dance", "unknown protocol 'dance'; there are teco-144-156, "),
        ("--protocol toy-8-8 --num-clips 9", "needed 9 clips of 16 frames that do not overlap"),
        (
            "--protocol toy-8-8 --clips first --num-clips 4",
            "give 3, 0 are too short; --num-clips 3",
        ),
        ("--protocol teco-36-264", "measures fvd: needed weights of TF-Hub's I3D, the network of"),
        (
            "--protocol teco-144-156",
            "measures lpips: needed weights of AlexNet (alexnet-owt-7be5be79.pth, SHA-256 7be5be79",
        ),
        ("--protocol doom-36-264 --split val", "of frames of 128x128, {data} has 32x32"),
        ("--protocol toy-8-8 --context 0", "shuffled_actions=True has no effect"),
        ("--protocol toy-8-8 --context -1", "context must be 0 or more, got -1"),
        (
            "--protocol toy-8-8 --context 0 --no-shuffled-actions --judge {data}",
            "--judge has no effect: protocol toy-8-8 gives no frame",
        ),
        ("--protocol toy-8-8 --i3d x.pt", "--i3d has no effect: protocol toy-8-8 does not"),
        (
            "--protocol toy-8-8 --lpips --alexnet {data}/x.pth",
            "x.pth: no such file; needed weights",
        ),
        (
            "--protocol toy-8-8 --lpips --alexnet {data}/dataset.json",
            "needed one that begins with 7be5be79",
        ),
        (
            "--protocol toy-8-8 --fvd --horizon 10 --i3d {data}/dataset.json --i3d-sha256 abcdef01",
            "needed one that begins with abcdef01",
        ),
        (
            "--protocol toy-8-8 --fvd --horizon 10 --i3d {data}/dataset.json",
            "If this is the file that you mean, say so by --i3d-sha256 ",
        ),
    ],
)
def test_bad_input_is_status_2_and_one_line(
    line, message, run, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["evaluate", run, "--data", folder, *line.format(data=folder).split()]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "result.json")]
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message.format(data=folder) in errors and errors.count("\n") == 1
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "result.parts").exists()


def test_a_result_is_a_json_file(run, folder, tmp_path):
    with pytest.raises(ValueError, match="out must be a .json file, got result"):
        settings(run, folder, tmp_path, out="result")
    with pytest.raises(ValueError, match="needs --data"):
        evaluated(run, "", tmp_path)


def test_the_command_prints_the_table(run, folder, tmp_path, capsys):
    words = f"evaluate {run} --data {folder} --protocol toy-8-8 --num-clips 2 --context 2"
    words += f" --horizon 2 --batch-size 2 --device cpu --out {tmp_path}/e.json"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("toy-8-8: 2 clips, 1 trajectories each (mean)")
    assert f"saved {tmp_path}/e.json" in printed


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, folder, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = f"--data {folder} --protocol toy-8-8 --num-clips 5 --context 2 --horizon 3"
    flags += " --batch-size 2 --num-trajectories 2 --device cpu"
    launchers = {
        "one": [],
        "two": "torch.distributed.run --standalone --nproc-per-node 2 -m".split(),
    }
    results = {}
    for name, launcher in launchers.items():
        out = tmp_path / f"{name}.json"
        command = [sys.executable, "-m", *launcher, "scd", "evaluate", run, *flags.split()]
        process = subprocess.run(
            [*command, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("saved ") == 1
        results[name] = json.loads(out.read_text())
    for part in ("rows", "overall", "clips"):
        assert results["one"][part] == results["two"][part]
