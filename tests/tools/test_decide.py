"""Claims: pairs are added until the interval is narrow; every kind's training can be begun."""

import json

import pytest
import tyro

from scd.evaluation.protocols import EvaluateConfig
from scd.training.presets import PRESETS, TrainCommand
from tools import claims, decide

MAIN = claims.CLAIMS[0]


def row(low, high, metric="psnr", horizon=8, means=(20.0, 20.0)):
    return {
        "metric": metric,
        "horizon": horizon,
        "difference": (low + high) / 2,
        "ci_low": low,
        "ci_high": high,
        "means": dict(zip("ab", means, strict=True)),
    }


@pytest.mark.parametrize(
    ("rows", "narrow"),
    [
        ([row(-0.3, 0.3)], True),
        ([row(2.0, 2.5)], True),
        ([row(-0.4, 0.3)], False),
        ([row(-0.1, 0.1), row(-12, 12, "fvd", means=(100, 100))], False),
        ([row(-0.1, 0.1), row(-5, 5, "fvd", means=(90, 110))], True),
        ([row(-0.1, 0.1), row(-9.0, 9.0, horizon=16)], True),
    ],
)
def test_an_interval_is_narrow_by_its_width_alone(rows, narrow):
    assert decide.is_narrow(rows) is narrow


@pytest.mark.parametrize(
    ("low", "high", "narrow", "expected", "said"),
    [
        (0.1, 0.5, True, "better", "agrees"),
        (0.1, 0.5, False, "no worse", "agrees"),
        (-0.5, -0.1, True, "no worse", "disagrees"),
        (-0.5, -0.1, True, "nothing", "no claim; base is worse"),
        (-0.1, 0.2, True, "better", "no difference larger than 0.20 dB"),
        (-0.9, 0.2, False, "no worse", "not decided: the interval reaches 0.90 dB"),
    ],
)
def test_verdicts(low, high, narrow, expected, said):
    claim = claims.Claim(name="x", of="base", against="dense", said="", expected=expected)
    assert decide.verdict(claim, row(low, high), narrow) == said


@pytest.mark.parametrize("world", decide.WORLDS)
@pytest.mark.parametrize("kind", [kind for kind in decide.KINDS if kind != "guided"])
def test_every_kind_is_a_training_that_can_begin(world, kind, tmp_path):
    made = decide.training(decide.WORLDS[world], kind, 3, "toy:32", tmp_path)
    assert made[0] == "train"
    settings = tyro.cli(
        TrainCommand,
        args=made[2:],
        default=TrainCommand(run=PRESETS[made[1]]),
        config=(tyro.conf.AvoidSubcommands,),
    ).run
    assert settings.seed == 3 and settings.max_steps == decide.WORLDS[world].steps
    layers = sum(decide.LAYERS.values())
    if kind.startswith("dense"):
        assert settings.model.num_layers == (6 if kind == "dense_6" else layers)
    elif kind == "separable_4_2":
        assert settings.model.encoder.num_layers + settings.model.decoder.num_layers == 6
    elif not kind.startswith("deep"):
        assert settings.model.encoder.num_layers + settings.model.decoder.num_layers == layers


@pytest.mark.parametrize("world", decide.WORLDS)
def test_evaluations_of_every_world_allow_an_fvd(world, tmp_path):
    words = f"{decide.WORLDS[world].protocol} {decide.FVD}"
    protocol = tyro.cli(EvaluateConfig, args=words.split()).protocol
    assert protocol.fvd and not protocol.without_fvd
    # One with FVD and one without are kept apart: the latter is no answer to the former.
    assert len({decide.measured(tmp_path, "base", 0, fvd) for fvd in (True, False)}) == 2


def test_claims_are_between_known_kinds_and_have_names_of_their_own():
    kinds = {kind for claim in claims.CLAIMS for kind in (claim.of, claim.against)}
    assert kinds <= set(decide.KINDS)
    assert len({decide.slug(claim) for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def test_the_table_has_a_row_for_each_result_in_the_order_of_the_claims():
    def result(claim, world, low):
        rows = [row(low, low + 1, metric, at) for metric in ("psnr", "ssim") for at in (1, 8)]
        return {
            "claim": claim.name,
            "world": world,
            "seeds": 5,
            "compared": {"rows": rows},
            "listens": {"a-0": 1.5, "b-0": 0.25},
            "verdict": "agrees",
        }

    made = claims.decided(
        {"x": result(claims.CLAIMS[1], "toy", 2.0), "y": result(MAIN, "lake", 0.5)}
    )
    first, second = made.splitlines()[2:]
    assert first.startswith(f"| {MAIN.name} |") and "| lake | 5 | +1.00 [+0.50, +1.50] |" in first
    assert second.startswith(f"| {claims.CLAIMS[1].name} |") and "| 0.25 dB | agrees |" in second


@pytest.mark.slow
def test_pairs_are_trained_measured_and_kept(tmp_path, monkeypatch):
    tiny = decide.World(
        data="toy:32",
        record="",
        steps=2,
        model="--model.block.width 16 --model.block.head-dim 16 --model.block.rotary-axes 4 6 6 "
        "--num-frames 4 --batch-size 2 --validate-every 0 --sample-every 0 --threads 1",
        protocol="--context 2 --horizon 8 --num-clips 2 --num-steps 1 --no-memory",
    )
    monkeypatch.setitem(decide.WORLDS, "toy", tiny)
    monkeypatch.setattr(decide, "LAYERS", {"encoder": 1, "decoder": 1})
    monkeypatch.setitem(decide.KINDS, "dense", "--model.num-layers 2")
    monkeypatch.setattr(decide, "DOCS", tmp_path / "docs")
    (tmp_path / "docs" / "results").mkdir(parents=True)
    config = decide.DecideConfig(
        claim=decide.slug(MAIN), world="toy", out=str(tmp_path / "out"), seeds=2, most_seeds=2
    )
    result = decide.decide(MAIN, config)
    assert result["seeds"] == 2 and result["ci_low"] <= result["difference"] <= result["ci_high"]
    assert set(result["listens"]) == {"base-0", "dense-0", "base-1", "dense-1"}
    written = json.loads((tmp_path / "docs/results/claims_toy_base_against_dense.json").read_text())
    assert written["verdict"] == result["verdict"] and written["claim"] == MAIN.name
    # What is there is read; a third pair is not begun once the time is over.
    again = decide.DecideConfig(
        claim=config.claim, world="toy", out=config.out, seeds=3, most_seeds=3, budget_s=0
    )
    assert decide.decide(MAIN, again)["difference"] == result["difference"]
