"""Signals ask for a stop; only a person's second Ctrl-C is more than that."""

import os
import signal

import pytest

from caco_fast.engine import interrupt as module
from caco_fast.engine.interrupt import SIGNALS, Interrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.agreed() is None
        os.kill(os.getpid(), number)
        assert interrupt.agreed() == number
    assert signal.getsignal(number) == before


def test_one_signal_sent_by_torchrun_and_slurm_both_is_one_request() -> None:
    with Interrupt() as interrupt:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupt.agreed() == signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAME_KEYSTROKE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        with Interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
