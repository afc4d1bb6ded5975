"""Ranks stop together on a signal, and report an error that all of them meet only once."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from caco_fast.engine import ranks as module
from caco_fast.engine.ranks import Interrupt, ReportedElsewhere, report_error_once
from caco_fast.errors import UserError
from caco_fast.host import STOP_SIGNALS
from tests.ranks import CONTEXT

REPORTED, SILENT = 10, 11


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    # Tests may be run under nohup, which ignores SIGHUP.
    before = signal.signal(number, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            assert interrupt.agreed() is None
            os.kill(os.getpid(), number)
            assert interrupt.agreed() == number
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_is_no_request_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.agreed() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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


def _rank(rank: int, folder: Path, delays: tuple[float, ...]) -> None:
    store = _store(rank, folder, len(delays))
    code = 1
    try:
        with report_error_once(store, rank, len(delays)):
            time.sleep(delays[rank])
            raise UserError("the same on every rank")
    except UserError:
        code = REPORTED
    except ReportedElsewhere:
        code = SILENT
    # As tools/train.py ends a rank, and the store with rank 0.
    os._exit(code)


def _store(rank: int, folder: Path, ranks: int) -> dist.TCPStore:
    """A store that lives in rank 0, on a port that the system chooses."""
    address = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        partial = folder / "port.partial"
        partial.write_text(str(store.port))
        partial.rename(address)
        return store
    while not address.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(address.read_text()), ranks, is_master=False)


@pytest.mark.parametrize("delays", [(0.0, 0.6, 1.2), (1.2, 0.6, 0.0), (0.6, 0.0, 1.2)], ids=["0 first", "2", "1"])
def test_the_first_rank_reports_and_the_later_ones_know(tmp_path: Path, delays: tuple[float, ...]) -> None:
    """The store lives in rank 0, which must not take it along too early."""
    processes = [CONTEXT.Process(target=_rank, args=(rank, tmp_path, delays)) for rank in range(len(delays))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [REPORTED, SILENT, SILENT]
