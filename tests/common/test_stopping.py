"""Signals and time limits as wishes."""

import os
import signal
import threading
import time

import pytest

from scd.common.signals import Interrupted, StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_first_signal_is_a_wish_and_a_second_interrupts(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error, StopRequest() as stop:
        assert stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.reason == f"received {name}" and stop.signal_name == name
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) == before
    assert error.value.exit_status == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert isinstance(error.value, KeyboardInterrupt) and name in str(error.value)


def test_a_time_limit_is_over_when_it_is_over():
    with StopRequest(0.05) as stop:
        assert stop.reason == ""
        time.sleep(0.06)
        assert stop.reason == "the time limit of 0.05 s is over" and not stop.signal_name
    with StopRequest() as stop:
        assert stop.reason == ""


def test_outside_the_main_thread_it_does_not_touch_signals():
    before, reasons = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest(1e-6) as stop:
            time.sleep(0.01)
            reasons.append((stop.reason, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == [("the time limit of 1e-06 s is over", before)]
