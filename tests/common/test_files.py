"""One reader of JSON: what cannot be read names its file."""

import pytest

from scd.common.files import parse_json, read_json


def test_json_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": 2, "name": "ü"}', encoding="utf-8")
    assert read_json(path) == read_json(path, 2) == {"format": 2, "name": "ü"}
    with pytest.raises(ValueError, match="a.json: needed format 3, got 2"):
        read_json(path, 3)
    for content, message in ((b"[]", "needed format 2, got None"), (b"{", "is not JSON"),
                             (b"\xff", "is not JSON")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.json: {message}"):
            read_json(path, 2)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="line 3: is not JSON"):
        parse_json("{", "line 3")
