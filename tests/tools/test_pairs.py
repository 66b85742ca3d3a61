"""Differences over seeds: paired, with an interval, and only between what can be compared."""

import copy

import pytest

from tools import pairs, tables


def evaluation(gain, **settings):
    row = {"metric": "psnr_gain", "horizon": 1, "baseline": "model", "mean": gain}
    shuffled = row | {"baseline": "shuffled_actions", "mean": 99.0}
    return {
        "rows": [row, shuffled, row | {"metric": "memory"}],
        "settings": {"run": f"run {gain}", "out": "o", "data": "toy:32", "seed": 0} | settings,
        "model": {"kind": "SeparableDiffuser"},
        "commit": "c",
        "hardware": {"cpu": "x", "gpus": "none", "num_threads": 1, "torch": "2", "device": "cpu"},
    }


EVALUATIONS = {
    ("a", "0"): evaluation(2.0),
    ("b", "0"): evaluation(1.0),
    ("a", "1"): evaluation(4.0),
    ("b", "1"): evaluation(2.0),
    ("a", "2"): evaluation(6.0),
    ("b", "2"): evaluation(3.0),
}


def test_mean_difference_and_its_interval():
    (row,) = pairs.compare(("a", "b"), EVALUATIONS)["rows"]
    assert row["means"] == {"a": 4.0, "b": 2.0}
    assert row["difference"] == 2.0
    # Differences 1, 2, 3: deviation 1, Student's quantile of 2 degrees of freedom 4.303.
    assert row["ci_high"] - 2 == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert 2 - row["ci_low"] == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_what_cannot_be_compared_is_refused():
    lonely = {key: one for key, one in EVALUATIONS.items() if key != ("b", "1")}
    with pytest.raises(ValueError, match=r"without a partner \['1'\]"):
        pairs.compare(("a", "b"), lonely)
    with pytest.raises(ValueError, match="2 to 30 seeds"):
        pairs.compare(("a", "b"), {key: EVALUATIONS[key] for key in (("a", "0"), ("b", "0"))})
    other = copy.deepcopy(EVALUATIONS)
    other["a", "1"]["settings"]["data"] = "toy:64"
    with pytest.raises(ValueError, match="differ"):
        pairs.compare(("a", "b"), other)


def test_command_line(tmp_path, capsys):
    assert pairs.main(["name", "a", "b"]) == 2
    wrong = [str(tmp_path / f"c-{seed}.json") for seed in range(4)]
    assert pairs.main(["name", "a", "b", *wrong]) == 2
    assert "called neither a-SEED.json nor b-SEED.json" in capsys.readouterr().err


def test_table():
    page = tables.pairs({"joins": pairs.compare(("a", "b"), EVALUATIONS)})
    assert "mean over 3 seeds" in page and "+2.000 [-0.484, +4.484]" in page
