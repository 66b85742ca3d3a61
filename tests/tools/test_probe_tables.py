"""Several probes put together: the numbers of the table are those of the probes."""

import copy

import numpy as np
import pytest

from tools import probes


def probe(num_layers=2, num_steps=10, late=0.5):
    """The entries of a probe whose early steps look alike and whose late ones look like `late`."""
    matrix = np.full((num_steps, num_steps), 0.9)
    matrix[:8, 8:] = matrix[8:, :8] = late
    np.fill_diagonal(matrix, 1)
    kinds = dict.fromkeys(("cosine", "flattened", "centred", "centred_by_step"), matrix.tolist())
    named = [{"layer": number, "name": f"layer {number}"} for number in range(1, num_layers + 1)]
    return {
        "step_similarity": [layer | kinds | {"cka": [[1, 0.3], [0.3, 1]]} for layer in named],
        "attention": [layer | {"past_mass": [0.2, 0.4], "uniform": [0.8, 0.8]} for layer in named],
        "leave_one_out": [
            layer | {"relative_loss": layer["layer"] / 10, "ci_low": 0.05, "ci_high": 0.3}
            for layer in named
        ],
        "loss": {"levels": [0.5], "mean": [0.25]},
        "settings": {"num_clips": 4, "context": 3, "num_noises": 1, "num_steps": 10, "seed": 0},
        "command": "scd probe",
        "commit": "0" * 40,
        "hardware": {},
    }


def test_early_steps_are_compared_with_each_other_and_with_the_late_ones():
    layer = probes.summary("a", probe())["layers"][0]
    assert layer["centred"] == pytest.approx({"early": 0.9, "late": 0.5})
    assert layer["past_mass"] == pytest.approx(0.3)
    assert layer["past_mass_heads"] == [0.2, 0.4]


def test_the_table_shows_first_middle_and_last_layer_of_each_probe():
    result = probes.gather({"short": probe(3), "long": probe(12, late=0.7)})
    table = probes.probes({"name": result})
    assert table.count("\n") == 2 + 6
    assert "| short, layer 2 | 0.90 / 0.50 |" in table
    assert "| long, layer 6 | 0.90 / 0.70 |" in table
    assert "0.30 (0.80) | +120 % [+5, +30] |" in table


def test_probes_that_cannot_be_compared_are_refused():
    other = copy.deepcopy(probe())
    other["settings"]["num_steps"] = 20
    with pytest.raises(ValueError, match="differ in"):
        probes.gather({"a": probe(), "b": other})
    without = {key: value for key, value in probe().items() if key != "attention"}
    with pytest.raises(ValueError, match="'b': \\['attention'\\]"):
        probes.gather({"a": probe(), "b": without})


def test_the_plot_is_written(tmp_path):
    probes.draw(probes.gather({"a": probe()}), tmp_path / "images/a.png")
    assert (tmp_path / "images/a.png").stat().st_size > 10_000
