"""The generated tables say what the result files say."""

import json

import pytest

from docs import tables
from scd.checkpoint import save_world
from scd.evaluate import EvaluateConfig, evaluate

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
    config = EvaluateConfig(
        run=str(world), data="toy:32", context=2, horizon=2, out=str(out), num_clips=2, device="cpu"
    )
    evaluate(config)
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


@pytest.mark.parametrize("request_", ["speeds of tiny", "quality of tiny, psnr", "quality"])
def test_an_unknown_table_is_refused(request_, tmp_path):
    with pytest.raises(ValueError, match="no table"):
        tables.table(request_, tmp_path)


def test_a_missing_result_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        tables.render(PAGE, tmp_path)
