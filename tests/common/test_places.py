"""Other words for the same place, names that are free, and the nearest of known names."""

import json

import pytest

from scd.common.names import did_you_mean, known
from scd.common.places import (
    START_FILE,
    free_place,
    in_our_words,
    named_by,
    read_start,
    remember_start,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with clips and a run that was started in it."""
    folder = tmp_path / "project"
    for name in ("clips", "other", "runs/a"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    remember_start(folder / "runs" / "a")
    return folder


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("clips", "{project}/clips"),
        ("{project}/clips", "clips"),
        ("clips", "./runs/../clips/"),
        ("minecraft:clips?size=32", "minecraft:{project}/clips?size=32"),
    ],
)
def test_the_same_folder_in_other_words(theirs, ours, project):
    theirs, ours = theirs.format(project=project), ours.format(project=project)
    assert in_our_words({"data": [theirs], "seed": 0}, {"data": [ours]}) == {
        "data": [ours],
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("clips", "other"),
        ("clips", ""),
        ("", "."),
        ("nowhere", "./nowhere"),
        ("minecraft:clips", "ucf101:clips"),
        ("minecraft:clips?size=32", "minecraft:./clips?size=64"),
        ("toy:32", "toy:64"),
        ("a prompt?\nof \0 more", "clips"),
        (1, "clips"),
        (["clips"], ["./clips", "other"]),
    ],
    ids=str,
)
def test_what_means_something_else_stays(theirs, ours, project):
    assert in_our_words(theirs, ours) == theirs


def test_words_of_a_command_that_was_started_elsewhere(project, tmp_path, monkeypatch):
    start = read_start(project / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert in_our_words("clips", "project/clips") == "clips"
    assert in_our_words("clips", "project/clips", start) == "project/clips"
    assert in_our_words("clips", "project/other", start) == "clips"


def test_paths_lead_where_they_led_after_a_move(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The run alone: relative paths still start where the command was started.
    (project / "runs" / "a").rename(tmp_path / "b")
    assert in_our_words("clips", "project/clips", read_start(tmp_path / "b")) == "project/clips"
    # All of it together: absolute paths lead into what was moved, too.
    (tmp_path / "b").rename(project / "runs" / "a")
    project.rename(tmp_path / "moved")
    start = read_start(tmp_path / "moved" / "runs" / "a")
    assert in_our_words("clips", "moved/clips", start) == "moved/clips"
    assert in_our_words(str(project / "clips"), "moved/clips", start) == "moved/clips"
    assert in_our_words(str(project / "clips"), "moved/other", start) == str(project / "clips")


def test_a_start_that_is_damaged_is_named(tmp_path):
    assert read_start(tmp_path) is None
    (tmp_path / START_FILE).write_text(json.dumps(["clips"]))
    with pytest.raises(ValueError, match="start.json: needed folder and from_here"):
        read_start(tmp_path)


def test_the_first_name_that_is_free(tmp_path):
    for name in ("a.json", "a-2.json"):
        (tmp_path / name).touch()
    wanted = tmp_path / "a.json"
    assert free_place(wanted, lambda path: not path.exists()) == tmp_path / "a-3.json"
    assert free_place(wanted, lambda path: True) == wanted


def test_the_nearest_name_is_suggested():
    assert did_you_mean("dom", ["doom", "toy"]) == "; did you mean 'doom'?"
    assert did_you_mean("dance", ["doom", "toy"]) == ""
    assert known("toy", "world", ["doom", "toy"]) == "toy"
    with pytest.raises(
        ValueError, match="unknown world 'toi'; did you mean 'toy'.; there are doom"
    ):
        known("toi", "world", ["doom", "toy"])


def test_a_text_names_a_folder_beside_it(tmp_path):
    last = tmp_path / "last"
    last.write_text(" step_000002\r\n")
    assert named_by(last) == tmp_path / "step_000002"
    for data in (b"", b"../else", b"/etc", b"a\nb", b"\xff\xfe", b"a\0", b".."):
        last.write_bytes(data)
        with pytest.raises(ValueError, match="last must name a folder beside it, got '"):
            named_by(last)
    last.unlink()
    with pytest.raises(FileNotFoundError):
        named_by(last)
