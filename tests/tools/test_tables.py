"""The generated tables say what the result files say."""

import json

import pytest

from scd.bench.compare import CompareConfig, compare
from scd.bench.measure import BenchConfig, bench
from scd.evaluation.evaluate import evaluate
from scd.evaluation.protocols import EvaluateConfig, Protocol
from scd.models.checkpoint import save_world
from tools import speed, tables

PAGE = """# Page
<!-- table: quality of tiny, psnr at 1 2 -->
<!-- end of table -->
between
<!-- table: speed of tiny -->
| old |
<!-- end of table -->
<!-- table: origin of tiny -->
<!-- end of table -->
"""


@pytest.mark.parametrize("model_config", ["separable"], indirect=True)
def test_tables_hold_the_numbers_of_the_file(tiny_world, tmp_path):
    world = save_world(tiny_world, tmp_path / "world")
    out = tmp_path / "results/tiny.json"
    protocol = Protocol(context=2, horizon=2, num_clips=2)
    evaluate(EvaluateConfig(run=str(world), data="toy:32", protocol=protocol, out=str(out)))
    result = json.loads(out.read_text())
    page = tables.render(PAGE, out.parent)
    assert tables.render(page, out.parent) == page
    assert "| old |" not in page and page.count("<!--") == PAGE.count("<!--")
    for row in result["rows"]:
        if row["metric"] == "psnr" and row["horizon"] <= 2:
            assert f"{row['mean']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" in page
    for part in ("encoder", "decoder", "total"):
        assert f"| {1000 * result['seconds_per_frame'][part]['p50']:.1f} |" in page
    assert result["command"] in page
    # One row for the model, one for it misled, one for the baseline that needs no model.
    assert [page.count(name) for name in ("actions of another clip", "repeat the last")] == [1, 1]

    for row in result["rows"]:
        row["mean"] += 1
    out.write_text(json.dumps(result))
    assert tables.render(page, out.parent) != page


def test_tables_of_speed_hold_the_numbers_of_the_lines(tmp_path, brief_bench):
    rows, ratios = tmp_path / "results/rows.jsonl", tmp_path / "results/ratios.jsonl"
    spent = {"steps": "1,2", "json": str(rows), "device": "cpu"}
    bench(BenchConfig(model="toy,toy-dense", context="4,8", engine="plain", frames=1, **spent))
    compare(
        CompareConfig(
            a="model=toy-dense",
            b="model=toy",
            engine="plain",
            context="4,8",
            steps="1",
            rounds=1,
            frames=1,
            json=str(ratios),
            device="cpu",
        )  # fmt: skip
    )
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    table = tables.table("bench of rows", rows.parent)
    assert table.count("\n") == 2 + len(lines) == 10
    for line in lines:
        assert f"| {line['model']}" in table
        assert f"context {line['context']}, {line['steps']} steps" in table
        for name in ("seconds_per_frame_median", "p99_s", "encoder_s", "decoder_step_s"):
            assert f"| {tables.milliseconds(line[name])} |" in table
        assert f"| {line['fraction_of_limit']:.2f} |" in table
        assert f"| {line['frames_per_s_end_to_end']:.3g} |" in table
    table = tables.table("comparison of ratios", rows.parent)
    for line in map(json.loads, ratios.read_text().splitlines()):
        low, high = line["ratio_low"], line["ratio_high"]
        assert f"| {line['ratio_a_over_b']:.2f} [{low:.2f}, {high:.2f}] |" in table
        assert f"toy-dense / toy, prefix; context {line['a']['context']}, steps 1 |" in table
    # One command wrote all lines of a file.
    assert tables.table("origin of rows ratios", rows.parent).count("\n") == 4
    speed.draw("rows", tmp_path)
    assert (tmp_path / "images/rows.png").stat().st_size > 1000


def test_a_plot_of_no_rows_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/empty.jsonl").touch()
    with pytest.raises(ValueError, match="needs rows"):
        speed.draw("empty", tmp_path)


@pytest.mark.parametrize("request_", ["speeds of tiny", "quality of tiny, psnr", "quality"])
def test_an_unknown_table_is_refused(request_, tmp_path):
    with pytest.raises(ValueError, match="no table"):
        tables.table(request_, tmp_path)


def test_a_missing_result_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        tables.render(PAGE, tmp_path)


def test_tables_of_serving():
    page = {"steps": 4.0, "first_frame_s": 3.21, "frames_per_s": 41.5, "encoder_ms": 5.0}
    page |= {"decoder_ms": 8.0, "action_to_frame_p50_ms": 33.0, "action_to_frame_p99_ms": 61.0}
    assert "| `one` | 4 | 3.2 | 41.5 | 33 | 61 | 5.0 | 8.0 |" in tables.played({"one": page})
    result = {
        "settings": {"duration_s": 1800, "clients": 8},
        "counts": {"joined": 300, "frames": 9000},
        "num_faults": 0,
        "server_faults": 0.0,
        "memory_growth": -0.004,
        "alone_frames_per_s": 40.0,
        "fair_frames_per_s": 64.0,
        "over_alone": 1.6,
        "unfairness": 0.03,
    }
    (*_, row) = tables.loads({"two": {"result": result}}).splitlines()
    assert row == "| `two` | 30 | 8 | 300 | 9000 | 0 / 0 | -0.4 % | 40.0 | 64.0 (1.60) | 3 % |"


def test_tables_of_what_comes_before_training():
    held_out = {
        name: {"mean": mean, "ci_low": mean - low, "ci_high": mean + low}
        for name, mean, low in (("psnr", 30.5, 0.5), ("psnr_per_frame", 32, 1), ("ssim", 0.9, 0.02))
    }
    result = {"held_out": held_out, "elapsed_s": 600.0, "step": 3000}
    result["settings"] = {"network": "small-16"}
    (*_, row) = tables.autoencoders({"one": result}).splitlines()
    assert row.startswith("| `one` | small-16 | 3000 | 10 | 30.50 [30.00, 31.00] | 32.00 [31.00,")
    assert row.endswith("| 0.900 [0.880, 0.920] |")
    ratio = {"median": 6.0, "low": 5.0, "high": 7.0}
    rates = {"videos": 600.0, "latents": 900.0, "encoding": 700.0, "training": 100.0}
    read = {"frames_per_second": rates, "over_training": dict.fromkeys(rates, ratio)}
    _, _, videos, _, encoding = tables.loading({"two": read}).splitlines()
    assert videos == "| `two`, videos | 600 | 100 | 6.0 [5.0, 7.0] |"
    assert encoding == "| `two`, encoding | 700 | 100 | 6.0 [5.0, 7.0] |"
