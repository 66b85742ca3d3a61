"""The choice of a number of threads, on machines that are described by seconds per number."""

import time
from collections.abc import Callable

import pytest
import torch

from scd.common.runtime import cpu_threads
from scd.common.threads import ThreadChoice, crowded, ladder


class Machine:
    """A clock that a piece of work moves on, by so many seconds as there are threads for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        self.now, self.seconds, self.used = 0.0, seconds, list[int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, choice: ThreadChoice, num_pieces: int, size: int = 1) -> None:
        for _ in range(num_pieces):
            with choice.piece(size):
                number = torch.get_num_threads()
                self.used.append(number)
                self.now += size * self.seconds(number)


@pytest.fixture(autouse=True)
def cores():
    """Eight threads at most, whatever the machine of the test has."""
    with cpu_threads(8):
        yield


IDLE = {1: 0.217, 2: 0.164, 3: 0.150, 4: 0.140, 6: 0.150, 7: 0.16, 8: 0.17}
"""A small model: each number of threads, and the seconds of a step."""


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda number: IDLE[number], 4),
        (lambda number: 0.2 if number == 1 else 3.0, 1),
        (lambda number: 0.2, 1),
        (lambda number: 0.2 / number if number < 8 else 3.0, 7),
        (lambda number: 1e-2 / number, 8),
        (lambda number: 40.0 / number, 8),
    ],
    ids=["idle", "busy", "no gain", "one core busy", "brief", "large"],
)
@pytest.mark.parametrize("small", [True, False])
def test_the_fastest_number_is_found_in_the_first_pieces_and_kept(
    monkeypatch, seconds, best, small
):
    machine, found = Machine(monkeypatch, seconds), []
    choice = ThreadChoice(small=small, report=lambda by_number, number: found.append(number))
    machine.work(choice, 1000 if seconds(1) < 0.1 else 60)
    fastest = min(map(seconds, ladder(8)))
    assert seconds(found[0]) <= 1.1 * fastest and seconds(best) == fastest
    assert choice.chosen == choice.number == found[0] == machine.used[-1]
    assert choice.piece_s == pytest.approx(seconds(choice.chosen))
    choice.close()
    assert torch.get_num_threads() == 8


class CrowdedMachine(Machine):
    """A clock that small products move on too: several threads wait for each other's cores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        super().__init__(monkeypatch, seconds)
        monkeypatch.setattr(time, "perf_counter", self.tick)

    def tick(self) -> float:
        self.now += self.seconds(torch.get_num_threads()) / 1000
        return self.now


def test_no_piece_is_given_to_threads_that_wait_for_each_other(monkeypatch):
    machine = CrowdedMachine(monkeypatch, lambda number: 0.2 if number == 1 else 16.0)
    assert crowded(2) and not crowded(1) and torch.get_num_threads() == 8
    found = []
    machine.work(ThreadChoice(report=lambda seconds, number: found.append((seconds, number))), 40)
    assert set(machine.used) == {1}
    assert [(list(seconds), number) for seconds, number in found] == [([1], 1)]
    machine.seconds = lambda number: 0.2
    assert not crowded(2)


def test_a_slow_number_is_hardly_tried(monkeypatch):
    machine = Machine(monkeypatch, lambda number: 0.2 if number == 1 else 3.0)
    machine.work(ThreadChoice(), 200)
    assert machine.used.count(2) == 1 and set(machine.used) == {1, 2}


def test_work_that_another_process_slows_down_is_measured_again(monkeypatch):
    machine = Machine(monkeypatch, lambda number: IDLE[number])
    choice = ThreadChoice()
    machine.work(choice, 100)
    assert choice.chosen > 1
    machine.seconds = lambda number: 0.22 if number == 1 else 3.0
    before = machine.now
    machine.work(choice, 40)
    assert choice.chosen == 1 and machine.now - before < 60
    machine.seconds = lambda number: IDLE[number]
    machine.work(choice, 3000)
    assert choice.chosen > 1


def test_pieces_of_other_sizes_are_compared_by_size(monkeypatch):
    machine = Machine(monkeypatch, lambda number: IDLE[number])
    choice = ThreadChoice()
    for place in range(60):
        machine.work(choice, 1, size=(3, 1, 5)[place % 3])
    assert IDLE[choice.chosen] <= 1.1 * min(IDLE.values())


def test_a_known_number_is_kept_until_pieces_are_slower(monkeypatch):
    machine = Machine(monkeypatch, lambda number: IDLE[number])
    choice = ThreadChoice(known=(3, 0.150))
    machine.work(choice, 500)
    assert set(machine.used) == {3}
    machine.seconds = lambda number: 0.22 if number == 1 else 3.0
    machine.work(choice, 30)
    assert choice.chosen < 3
    # Measured on a machine with other cores: it is looked for anew.
    assert ThreadChoice(known=(64, 0.150)).number == 1


@pytest.mark.parametrize("settings", [{"threads": 5}, {"threads": 5, "known": (2, 0.1)}])
def test_a_given_number_stays(monkeypatch, settings):
    machine = Machine(monkeypatch, lambda number: 1.0)
    choice = ThreadChoice(**settings)
    machine.work(choice, 50)
    assert set(machine.used) == {5} and choice.piece_s == 0


def test_without_a_choice_nothing_changes(monkeypatch):
    machine = Machine(monkeypatch, lambda number: 1.0)
    machine.work(ThreadChoice(active=False), 20)
    torch.set_num_threads(1)
    machine.work(ThreadChoice(), 20)
    assert machine.used == 20 * [8] + 20 * [1]


def test_a_piece_that_fails_measures_nothing(monkeypatch):
    choice = ThreadChoice()
    for _ in range(50):
        with pytest.raises(OSError, match="full"), choice.piece():
            raise OSError("the disk is full")
    assert choice.piece_s == 0 and choice.number == 1


def test_numbers_that_are_tried():
    assert ladder(1) == [1] and ladder(2) == [1, 2] and ladder(4) == [1, 2, 3, 4]
    assert ladder(16) == [1, 2, 3, 4, 6, 8, 12, 15, 16]
    assert ladder(5) == [1, 2, 3, 4, 5]
