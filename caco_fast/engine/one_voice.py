"""How a run on several ranks ends when one of them can't go on: said once, and no rank left waiting."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from caco_fast.engine.interrupt import Interrupted
from caco_fast.errors import UserError

# How long a rank that lost contact waits for the word of the others, some of which may be busy with a step; torchrun
# gives them 30 s. Where only one is silent, it is that one.
PATIENCE_SECONDS, PATIENCE_WITH_ONE = 10.0, 1.0
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
    try:
        yield
    except Interrupted as stopped:
        if rank == 0:
            raise
        raise SaidElsewhere(stopped.exit_code) from None
    except Exception as error:
        # torchrun ends the ranks that are left; their last words come first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _of_gloo(error)):
            _report_loss(store, rank, ranks, error)
        elif not _first(store, rank, f"{type(error).__name__}: {error}"):
            raise SaidElsewhere(2 if isinstance(error, UserError) else 1) from None
        raise


def _first(store: dist.Store, rank: int, words: str) -> bool:
    """Whether no other rank has said this. Where the store is gone too, each speaks for itself."""
    try:
        store.set(f"left/{rank}", words)
        return store.add(f"said/{words}", 1) == 1
    except RuntimeError:
        return True


def _report_loss(store: dist.Store, rank: int, ranks: int, error: Exception) -> None:
    others = [other for other in range(ranks) if other != rank]
    reason = " ".join(str(error).split("] ")[-1].split())[:120]
    try:
        store.set(f"left/{rank}", "")
        begun = time.monotonic()
        while silent := [other for other in others if not store.check([f"left/{other}"])]:
            patience = PATIENCE_WITH_ONE if len(silent) == 1 else PATIENCE_SECONDS
            heard = [other for other in others if other not in silent]
            if time.monotonic() > begun + patience or _spoken(store, heard):
                break
            time.sleep(0.05)
        if _spoken(store, [other for other in others if other not in silent]) or store.add("lost", 1) > 1:
            raise SaidElsewhere(LOST) from None
        who = f"no answer from rank {', '.join(map(str, silent))}" if silent else "the ranks lost contact"
    except RuntimeError:
        # Without torchrun the store lives in rank 0.
        if rank != 1 and os.environ.get("LOCAL_RANK") != "0":
            raise SaidElsewhere(LOST) from None
        who = "no answer from rank 0, nor from the ranks' meeting point"
    raise RankLost(f"{who}: killed, crashed or hung ({reason})") from None


def _of_gloo(error: RuntimeError) -> bool:
    return any(mark in str(error) for mark in MARKS)


def _spoken(store: dist.Store, ranks: list[int]) -> bool:
    """Whether one of these ranks ended by an error of its own, which it reports."""
    return any(store.get(f"left/{rank}") for rank in ranks)
