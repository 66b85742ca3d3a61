"""One reader of JSON: what cannot be read names its file; files that others can read."""

import os
import resource
import stat
import threading

import pytest
import torch
from safetensors.torch import save_file

from scd.common import files
from scd.common.files import (
    file_aside,
    parse_json,
    read_json,
    read_text,
    text_lines,
    write_file,
    written_aside,
)


@pytest.fixture
def umask():
    """Set the umask for a test, and put back the one before."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_leaves(mask, wanted, umask, tmp_path):
    umask(mask)
    tensors = {"a": torch.zeros(2)}
    write_file(tmp_path / "a.json", "{}")
    with file_aside(tmp_path / "b.safetensors") as aside:
        save_file(tensors, aside)
    with written_aside(tmp_path / "world") as aside:
        save_file(tensors, aside / "model.safetensors")
        (aside / "vae").mkdir()
        save_file(tensors, aside / "vae" / "model.safetensors")
        (aside / "run.sh").touch()
        (aside / "run.sh").chmod(0o700)
    for name in (
        "a.json",
        "b.safetensors",
        "world/model.safetensors",
        "world/vae/model.safetensors",
    ):
        assert mode(tmp_path / name) == wanted, name
    # What may be run still may.
    assert mode(tmp_path / "world" / "run.sh") == wanted | 0o100
    assert mode(tmp_path / "world") == mode(tmp_path / "world" / "vae") == 0o777 & ~mask
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.safetensors", "world"}


def test_a_file_that_was_not_written_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), file_aside(tmp_path / "a"):
        pass
    with pytest.raises(ZeroDivisionError), file_aside(tmp_path / "a") as aside:
        aside.touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_in_one_moment(tmp_path):
    """A reader that looks again and again finds the one or the other, whole."""
    folder, seen = tmp_path / "world", set()

    def write(number):
        with written_aside(folder) as aside:
            (aside / "number").write_text(str(number))

    write(0)
    writer = threading.Thread(target=lambda: [write(number) for number in range(1, 60)])
    writer.start()
    while writer.is_alive():
        seen.add((folder / "number").read_text())
    writer.join()
    assert len(seen) > 1 and [path.name for path in tmp_path.iterdir()] == ["world"]


def test_where_folders_cannot_be_exchanged_the_old_one_steps_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SWAP", 1 << 20)
    for number in range(2):
        with written_aside(tmp_path / "world") as aside:
            (aside / str(number)).touch()
    assert not files.exchange(tmp_path / "world", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["world", "world/1"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path):
    killed = tmp_path / f"{files.TEMPORARY}world-0123"
    killed.mkdir()
    (killed / "half").touch()
    with written_aside(tmp_path / "world") as first:
        with written_aside(tmp_path / "world") as second:
            (second / "second").touch()
        assert first.is_dir() and not killed.exists()
        (first / "first").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["first", "world"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "world").symlink_to("disk")
    with written_aside(tmp_path / "world") as aside:
        (aside / "new").touch()
    assert (tmp_path / "world").is_symlink() and (tmp_path / "disk/new").is_file()


def test_json_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": 2, "name": "ü"}', encoding="utf-8")
    assert read_json(path) == read_json(path, 2) == {"format": 2, "name": "ü"}
    with pytest.raises(ValueError, match="a.json: needed format 3, got 2"):
        read_json(path, 3)
    for content, message in ((b"[]", "needed format 2, got None"), (b"{", "is not JSON"),
                             (b"\xff", "no text in UTF-8")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.json.*: .*{message}"):
            read_json(path, 2)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    for text in ("{", "[" * 100_000, "9" * 5000, b"\xff"):
        with pytest.raises(ValueError, match="line 3: is not JSON"):
            parse_json(text, "line 3")


SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
"""Characters at which `str.splitlines` cuts and a file's lines do not end."""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_at_line_breaks_alone(end, mark, tmp_path):
    path = tmp_path / "lines.txt"
    wanted = [SEPARATORS, "", "größer 猫"]
    path.write_bytes((mark + end.join(wanted) + end).encode())
    assert text_lines(path) == wanted
    path.write_bytes((mark + end.join(wanted)).encode())
    assert text_lines(str(path)) == wanted
    path.write_bytes(mark.encode())
    assert text_lines(path) == [] and read_text(path) == ""


def test_what_is_no_utf_8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "lines.txt"
    for data, line in ((b"a\nb\nc\xe9t\xe9\n", 3), ("\ufeffa\n".encode("utf-16-le"), 1)):
        path.write_bytes(data)
        for read in (read_text, text_lines, read_json):
            with pytest.raises(ValueError, match=f"lines.txt line {line}: is no text in UTF-8"):
                read(path)
    path.write_bytes("\ufeff{}".encode())
    assert read_json(path) == {}


def test_a_disk_that_refuses_in_the_middle_of_a_file_is_told_with_its_name(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/x.json'"):
            write_file(tmp_path / "x.json", "1" * 2000)
        with (
            pytest.raises(OSError, match=f"File too large: '{tmp_path}/folder'"),
            written_aside(tmp_path / "folder") as aside,
        ):
            (aside / "x").write_text("1" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    # What has nothing to do with the disk stays as it is.
    with pytest.raises(OSError, match="^something else$"), file_aside(tmp_path / "x.json"):
        raise OSError("something else")
