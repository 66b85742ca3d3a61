"""Examples and benchmark of many futures, run as they are typed, in small."""

import importlib.util
import subprocess
import sys

import pytest

WANTS_PPO = importlib.util.find_spec("stable_baselines3") is None


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


def test_a_plan_leads_nearer_to_the_target_than_chance():
    done = run(
        "examples/planning.py", "--futures", "24", "--rounds", "2", "--actions", *["left"] * 4
    )
    assert done.returncode == 0, done.stderr
    distances = {
        words.split(":")[0].strip(): float(number)
        for number, _, words in (
            line.strip().partition("  ") for line in done.stdout.splitlines()[3:]
        )
    }
    assert set(distances) == {"at random", "the hidden ones", "random shooting", "cross-entropy"}
    found = max(distances["random shooting"], distances["cross-entropy"])
    assert distances["the hidden ones"] < distances["at random"] and found < distances["at random"]
    for words, message in (
        (["--actions", "jump"], "actions must be of ['none', 'forward', 'left', 'right']"),
        (["--clip", "9"], "there are 4 clips of 48 frames"),
    ):
        done = run("examples/planning.py", *words)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_both_ways_that_the_benchmark_times_make_the_same_frames(tmp_path, engine):
    words = ["--futures", "3", "--frames", "2", "--rounds", "1", "--engine", engine]
    done = run(
        "benchmarks/planning.py", *words, "--threads", "1", "1", "--out", f"{tmp_path}/a.json"
    )
    assert done.returncode == 0, done.stderr
    assert "times as many" in done.stdout and (tmp_path / "a.json").is_file()
    assert float(done.stdout.split("frames differ by ")[1].split()[0]) < 2e-5


@pytest.mark.skipif(WANTS_PPO, reason="needs stable-baselines3")
def test_an_agent_learns_inside_a_world():
    done = run("examples/ppo.py", "--steps", "128", "--envs", "2", "--test-episodes", "2")
    assert done.returncode == 0, done.stderr
    assert "learned in 128 frames" in done.stdout and "as learned" in done.stdout


@pytest.mark.skipif(not WANTS_PPO, reason="stable-baselines3 is installed")
def test_without_the_package_the_agent_says_what_to_install():
    done = run("examples/ppo.py")
    assert done.returncode == 2 and "pip install -e '.[rl]'" in done.stderr
