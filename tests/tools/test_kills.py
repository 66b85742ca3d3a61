"""Kill -9 at file operations: a short form of tools/kills.py."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools/kills.py"


def test_a_world_that_is_saved_over_another_is_never_lost(tmp_path):
    words = ["--cases", "save", "--every", "2", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True)
    found = json.loads((tmp_path / "save.json").read_text())
    # The new folder is made, the two are exchanged, and the old one is removed.
    assert found["operations"] >= 5 and len(found["killed"]) >= 3, done.stdout
    assert done.returncode == 0 and not found["failed"], found
