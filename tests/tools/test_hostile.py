"""Bad manners against a server: a short form of what tools/hostile.py does, and that it judges."""

import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_inputs import Wrong

from tools import hostile

ROOT = Path(__file__).resolve().parents[2]


def test_a_few_of_each_keep_nobody_from_playing(tmp_path):
    words = [sys.executable, "tools/hostile.py", "--count", "3", "--seconds", "0.4"]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "found.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["attack"] for one in found["attacks"]] == list(hostile.ATTACKS)
    assert all(one["made"] for one in found["attacks"])
    by_name = {one["attack"]: set(one["statuses"]) for one in found["attacks"]}
    assert by_name["guesses"] == {"401"} and by_name["origins"] == {"403"}
    assert not found["found"]


@pytest.mark.parametrize(
    ("answer", "is_fault"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\nInternal Server Error", True),
        (b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":{"code":"unavailable"}}', True),
        (b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":{"code":"too_many_sessions"}}', False),
        (b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":{"code":"overloaded"}}', False),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"", False),
    ],
)
def test_a_fault_of_the_server_is_told_from_a_refusal(answer, is_fault):
    attack = hostile.Attack(
        open=None, closed=None, random=random.Random(0), count=3, seconds=60.0
    )  # fmt: skip
    assert list(attack.rounds()) == [0, 1, 2]
    if is_fault:
        with pytest.raises(Wrong, match="the server answers"):
            attack.note(answer)
    else:
        attack.note(answer)
    assert isinstance(attack.statuses, collections.Counter) and attack.statuses.total() == 1


def test_it_is_bounded_and_knows_its_attacks():
    for wrong in ({"count": 0}, {"seconds": 1e9}, {"attacks": ("politeness",)}):
        with pytest.raises(ValueError, match="needed attacks of origins"):
            hostile.HostileConfig(**wrong)
