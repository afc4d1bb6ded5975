"""How a run on several ranks ends when one of them can't go on: said once, and no rank left waiting."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from caco_fast.engine.interrupt import Interrupted
from caco_fast.errors import UserError

# How long a rank that lost contact waits for word from the others where nothing is known of them. torchrun leaves the
# ranks 30 s once one has ended.
PATIENCE_SECONDS = 10.0
# How long rank 0, where the store lives in it, stays for the others' questions; ranks that meet the same error come
# within moments, those that wait for it in a collective only ask when it has gone.
HOSTING_SECONDS = 5.0
LOST = 75
# gloo's errors have no type of their own.
MARKS = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Application timeout")


class RankLost(Exception):
    """Another rank was killed, crashed or hangs. The status is that of a failure which trying again may mend."""

    exit_code = LOST


class SaidElsewhere(Exception):
    """This rank ends because of what another rank reports; it has nothing to add but its exit status."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank reports why")
        self.exit_code = exit_code


@contextmanager
def one_voice(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """Lets an error that ends the run leave this block on one rank only; the others raise SaidElsewhere.

    The ranks find out through `store`, which outlives their connections. A lost connection to a rank that ended by an
    error of its own is no news; one to a rank that left no word is raised as RankLost, with the rank's number.
    """
    store.set(f"place/{rank}", f"{_machine()} {os.getpid()}")
    try:
        yield
    except Interrupted as stopped:
        if rank == 0:
            raise
        raise SaidElsewhere(stopped.exit_code) from None
    except Exception as error:
        # torchrun ends the ranks that are left; their last words come first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _of_gloo(error)):
                _report_loss(store, rank, ranks, error)
            elif not _first(store, rank, f"{type(error).__name__}: {error}"):
                raise SaidElsewhere(2 if isinstance(error, UserError) else 1) from None
        finally:
            _let_all_ask(store, rank, ranks)
        raise


def _first(store: dist.Store, rank: int, words: str) -> bool:
    """Whether no other rank has said this. Where the store is gone too, each speaks for itself."""
    try:
        store.set(f"left/{rank}", words)
        return store.add(f"said/{words}", 1) == 1
    except RuntimeError:
        return True


def _let_all_ask(store: dist.Store, rank: int, ranks: int) -> None:
    """Keeps rank 0 until the others have their answers: without torchrun the store ends with it."""
    with suppress(RuntimeError):
        store.set(f"asked/{rank}", "")
        if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        waiting, end = set(range(1, ranks)), time.monotonic() + HOSTING_SECONDS
        while waiting and time.monotonic() < end:
            waiting = {other for other in waiting if not store.check([f"asked/{other}"]) and not _is_dead(store, other)}
            time.sleep(0.05)


def _report_loss(store: dist.Store, rank: int, ranks: int, error: Exception) -> None:
    others = [other for other in range(ranks) if other != rank]
    reason = " ".join(str(error).split("] ")[-1].split())[:120]
    try:
        store.set(f"left/{rank}", "")
        begun, dead = time.monotonic(), []
        # A rank that is silent may also wait for this one, in a collective that breaks when this one leaves.
        while silent := [other for other in others if not store.check([f"left/{other}"])]:
            dead = [other for other in silent if _is_dead(store, other)]
            if dead or store.check(["lost"]) or time.monotonic() > begun + PATIENCE_SECONDS:
                break
            time.sleep(0.05)
        spoken = any(store.get(f"left/{other}") for other in others if other not in silent)
        if spoken or store.add("lost", 1) > 1:
            raise SaidElsewhere(LOST) from None
        who = f"rank {', '.join(map(str, dead or silent or others))}"
        line = f"{who} is gone, killed or crashed" if dead else f"no answer from {who}, which hangs or is cut off"
    except RuntimeError:
        # Without torchrun the store lives in rank 0.
        if rank != 1 and os.environ.get("LOCAL_RANK") != "0":
            raise SaidElsewhere(LOST) from None
        line = "no answer from rank 0, nor from the ranks' meeting point"
    raise RankLost(f"{line} ({reason})") from None


def _is_dead(store: dist.Store, rank: int) -> bool:
    """Whether the process of a rank on this machine has ended; False for one on another, or not yet in the block."""
    if not store.check([f"place/{rank}"]):
        return False
    machine, _, pid = store.get(f"place/{rank}").decode().rpartition(" ")
    if machine != _machine():
        return False
    try:
        # The state stands behind the name in brackets; Z has ended, and its parent has not asked yet.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _machine() -> str:
    """The place within which a process has its number."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()} without /proc"


def _of_gloo(error: RuntimeError) -> bool:
    return any(mark in str(error) for mark in MARKS)
