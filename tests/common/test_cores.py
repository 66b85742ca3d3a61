"""Cores are lent as long as there are any, and work comes back in its order."""

import os
import threading

import pytest

from scd.common.cores import Cores


def test_cores_are_lent_once_and_everyone_has_their_own():
    cores = Cores(4)
    with cores.take(3) as first:
        with cores.take(3) as second, cores.take(5) as third:
            assert (first, second, third) == (3, 1, 1)
        with cores.take(0) as least:
            assert least == 1
    with pytest.raises(KeyError), cores.take(9) as all_of_them:
        assert all_of_them == 4
        raise KeyError
    with cores.take(9) as again:
        assert again == 4


def test_parts_run_at_the_same_time_and_errors_wait_for_the_others():
    cores = Cores(3)
    meet = threading.Barrier(3, timeout=20)

    def part(number):
        meet.wait()
        return number, threading.current_thread().name

    numbers, names = zip(*cores.run([lambda at=at: part(at) for at in range(3)]), strict=True)
    assert numbers == (0, 1, 2)
    assert len(set(names)) == 3 and names[0] == threading.current_thread().name
    done = threading.Event()

    def late():
        done.wait(0.1)
        done.set()

    with pytest.raises(ZeroDivisionError):
        cores.run([lambda: 1 / 0, late])
    assert done.is_set()
    with pytest.raises(ZeroDivisionError):
        cores.run([late, lambda: 1 / 0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    cores = Cores(2)
    assert cores.run([lambda: 1, lambda: 2]) == [1, 2]
    with cores.take(2):
        child = os.fork()
        if not child:
            with cores.take(2) as number:
                os._exit(0 if number == 2 and cores.run([lambda: 3, lambda: 4]) == [3, 4] else 1)
        assert os.waitpid(child, 0)[1] == 0
