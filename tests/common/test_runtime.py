"""Seeds, devices and what is said about the machine."""

import re
import subprocess
import sys

import pytest
import torch

from scd.common.config import parse_shard
from scd.common.runtime import (
    cache_folder,
    choose_device,
    derive_seed,
    describe_hardware,
    git_commit,
    make_generator,
    peak_memory_gib,
    without_weights,
)


def test_seeds_are_the_same_in_every_process_and_fit_a_generator():
    # Written down: another value would change every run of the past.
    assert derive_seed(0, "train", 1, 2) == 6532432334001506813
    code = "from scd.common.runtime import derive_seed; print(derive_seed(0, 'train', 1, 2))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(0, "train", 1, 2)
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(1000))


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert str(cache_folder("compiled")) == "elsewhere/scd/compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")
    assert str(cache_folder("compiled")) == "home/.cache/scd/compiled"


def test_shards_count_from_zero():
    assert parse_shard("0/1") == (0, 1) and parse_shard("2/8") == (2, 8)
    for wrong in ("4/4", "1", "a/b", "-1/2", "0/0", "1/"):
        with pytest.raises(ValueError, match="shard must be i/n with i in 0 .. n - 1, got"):
            parse_shard(wrong)


def test_any_other_seed_purpose_or_index_is_another_stream():
    draws = [
        tuple(torch.rand(4, generator=make_generator(*key)).tolist())
        for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1))
    ]
    assert len(set(draws)) == len(draws)
    first, again = (torch.rand(4, generator=make_generator(3, "a", 7)) for _ in range(2))
    assert torch.equal(first, again)


def test_generators_leave_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(10, generator=make_generator(0, "a"))
    assert torch.equal(torch.rand(3), expected)


def test_devices_that_do_not_exist_are_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="has .* GPUs"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        choose_device("abacus")


def test_the_machine_is_described():
    described = describe_hardware()
    assert described["torch"] == torch.__version__
    assert int(described["num_cores"]) >= 1 and described["cpu"]
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", git_commit())
    assert peak_memory_gib(torch.device("cpu")) < 1000


NEEDED = ("config", "cores", "files", "runtime")
"""Modules that runtime needs, and itself."""


def test_there_is_no_commit_outside_a_checkout(tmp_path):
    package = tmp_path / "scd"
    (package / "common").mkdir(parents=True)
    for part in ("__init__", "common/__init__", *map("common/{}".format, NEEDED)):
        name = f"{part}.py"
        text = (sys.modules["scd"].__path__[0] + "/" + name, package / name)
        text[1].write_text(open(text[0]).read())
    code = "from scd.common.runtime import git_commit; print(git_commit())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "unknown"


UNDRAWN = """
import sys
import scd
import scd.serving.run
from scd.common.runtime import without_weights
from torch import nn
world = scd.load(sys.argv[1])
assert not any(one.is_meta for one in world.model.parameters())
with without_weights():
    made = [nn.Embedding(3, 4), nn.Linear(2, 3), nn.Conv2d(1, 2, 3), nn.MultiheadAttention(4, 2)]
    nn.init.trunc_normal_(made[0].weight)
    nn.init.normal_(made[1].weight, std=0.5)
assert all(one.is_meta for part in made for one in part.parameters())
print(*{"torch._dynamo", "torch._inductor", "sympy", "matplotlib"} & set(sys.modules))
"""


def test_neither_compiler_nor_plots_are_imported_to_serve_a_world():
    words = [sys.executable, "-c", UNDRAWN, "cars"]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    assert made.stdout.split() == []


def test_weights_are_drawn_again_after_networks_without_them():
    torch.manual_seed(0)
    before = torch.nn.Linear(3, 4).weight.detach().clone()
    torch.manual_seed(0)
    with without_weights():
        torch.nn.Linear(5, 6)
    again = torch.nn.Linear(3, 4).weight
    assert torch.equal(before, again) and not again.is_meta
