"""The end of a run on all ranks together: a stop by a signal, or one error line and no rank left waiting."""

import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from caco_fast.distributed import is_distributed
from caco_fast.errors import UserError
from caco_fast.host import STOP_SIGNALS

# torchrun and SLURM may both forward one Ctrl-C to the same process.
SAME_KEYSTROKE_SECONDS = 1.0

# How long a rank that lost contact waits for a message of the others while it knows nothing of them. torchrun gives
# the ranks 30 s once one of them has ended.
PATIENCE_SECONDS = 10.0
# How long rank 0 keeps the store alive for the others if it hosts the store. Ranks that meet the same error ask within
# moments. Those that wait for rank 0 in a collective only ask after it has gone.
HOSTING_SECONDS = 5.0
LOST = 75
# gloo raises plain RuntimeErrors, so only their text tells that a connection broke.
GLOO_ERROR_TEXTS = (
    "gloo/",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout",
)


class Interrupted(Exception):
    """A stop on request, after a checkpoint was written. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankLost(Exception):
    """Another rank was killed, crashed or hangs. The exit status says that a new attempt may succeed."""

    exit_code = LOST


class ReportedElsewhere(Exception):
    """The end of this rank for a reason that another rank reports; this one only adds its exit status."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank reports why")
        self.exit_code = exit_code


class Interrupt:
    """A context in which the first of `STOP_SIGNALS` only sets `signal`, as a request to stop after the present step.

    A later SIGINT acts as usual. A later one of the others is ignored; a process that does not stop can still be ended
    by SIGKILL. SIGHUP stays ignored if it was, as under nohup. `timeout_s` is how long a rank waits for the answers of
    the others.
    """

    def __init__(self, timeout_s: float = 600.0, max_seconds: float = 0.0) -> None:
        self.signal: signal.Signals | None = None
        # Whether all ranks have agreed to end the run because `max_seconds` are over. 0 is for ever.
        self.out_of_time = False
        self._max_seconds = max_seconds
        self._deadline = math.inf
        self.timeout_s = timeout_s
        self._requested_at = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Interrupt":
        self.signal, self.out_of_time = None, False
        self._deadline = time.monotonic() + (self._max_seconds or math.inf)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous_handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if self._pending is not None and (kind is None or issubclass(kind, Interrupted)):
            # All ranks have started this all-reduce; a rank that left now would break it for the others.
            self._pending[0].wait()
            dist.destroy_process_group(self._group)
            self._pending = self._group = None
        if kind is not None and is_distributed():
            # torchrun ends the other ranks once one has gone; they must report their reason before that.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agreed(self) -> signal.Signals | None:
        """Return the signal to stop for, or None to continue. Every rank calls this after every step.

        All ranks get the same answer. With several ranks it is a signal that any of them received before the step now
        done began: the all-reduce travels over gloo during a step, so that no rank waits for it and no GPU is
        synchronised. A lost rank shows here at the next step, as an error. A GPU's own collectives would only show it
        after their timeout.
        """
        # Of several requests a signal counts more.
        request = 2 * (self.signal or 0) + (time.monotonic() > self._deadline)
        if not is_distributed():
            return self._answer(request)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        previous, flag = self._pending, torch.tensor([request])
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        if previous is None:
            return None
        answers, flag = previous
        answers.wait()
        return self._answer(int(flag))

    def _answer(self, request: int) -> signal.Signals | None:
        asked, self.out_of_time = divmod(request, 2)[0], bool(request)
        return signal.Signals(asked) if asked else None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._requested_at = signal.Signals(number), now
        elif number == signal.SIGINT and now > self._requested_at + SAME_KEYSTROKE_SECONDS:
            self._restore()
            signal.default_int_handler(number, frame)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


@contextmanager
def report_error_once(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """Let an error that ends the run leave this block on one rank only; the others raise ReportedElsewhere.

    The ranks agree through `store`, which outlives their connections. A broken connection to a rank that ended by an
    error of its own needs no report. If a rank is gone and left no message, RankLost is raised with its number.
    """
    store.set(f"place/{rank}", f"{_process_namespace()} {os.getpid()}")
    try:
        yield
    except Interrupted as stopped:
        if rank == 0:
            raise
        raise ReportedElsewhere(stopped.exit_code) from None
    except Exception as error:
        # torchrun ends the ranks that are left; they must report before that.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _is_from_gloo(error)):
                _report_loss(store, rank, ranks, error)
            elif not _is_first_to_report(store, rank, f"{type(error).__name__}: {error}"):
                raise ReportedElsewhere(2 if isinstance(error, UserError) else 1) from None
        finally:
            _keep_store_for_others(store, rank, ranks)
        raise


def _is_first_to_report(store: dist.Store, rank: int, message: str) -> bool:
    """Whether no other rank has reported this message. If the store is gone too, every rank reports."""
    try:
        store.set(f"left/{rank}", message)
        return store.add(f"reported/{message}", 1) == 1
    except RuntimeError:
        return True


def _keep_store_for_others(store: dist.Store, rank: int, ranks: int) -> None:
    """Keep rank 0 alive until the others have their answers: without torchrun the store ends with rank 0."""
    with suppress(RuntimeError):
        store.set(f"asked/{rank}", "")
        if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        waiting, end = set(range(1, ranks)), time.monotonic() + HOSTING_SECONDS
        while waiting and time.monotonic() < end:
            waiting = {other for other in waiting if not store.check([f"asked/{other}"]) and not _is_dead(store, other)}
            time.sleep(0.05)


def _report_loss(store: dist.Store, rank: int, ranks: int, error: Exception) -> None:
    """Raise RankLost with the number of the lost rank, or ReportedElsewhere if another rank has the explanation."""
    others = [other for other in range(ranks) if other != rank]
    reason = " ".join(str(error).split("] ")[-1].split())[:120]
    try:
        store.set(f"left/{rank}", "")
        begin, dead = time.monotonic(), []
        # A silent rank may also wait for this one, in a collective that breaks when this one leaves.
        while silent := [other for other in others if not store.check([f"left/{other}"])]:
            dead = [other for other in silent if _is_dead(store, other)]
            if dead or store.check(["lost"]) or time.monotonic() > begin + PATIENCE_SECONDS:
                break
            time.sleep(0.05)
        explained = any(store.get(f"left/{other}") for other in others if other not in silent)
        if explained or store.add("lost", 1) > 1:
            raise ReportedElsewhere(LOST) from None
        who = f"rank {', '.join(map(str, dead or silent or others))}"
        line = f"{who} is gone, killed or crashed" if dead else f"no answer from {who}, which hangs or is cut off"
    except RuntimeError:
        # Without torchrun the store was in rank 0, which has gone.
        if rank != 1 and os.environ.get("LOCAL_RANK") != "0":
            raise ReportedElsewhere(LOST) from None
        line = "no answer from rank 0, nor from the ranks' meeting point"
    raise RankLost(f"{line} ({reason})") from None


def _is_dead(store: dist.Store, rank: int) -> bool:
    """Whether the process of a rank on this machine has ended. False for other machines, and before it has started."""
    if not store.check([f"place/{rank}"]):
        return False
    namespace, _, pid = store.get(f"place/{rank}").decode().rpartition(" ")
    if namespace != _process_namespace():
        return False
    try:
        # The state follows the name in brackets. Z has ended, and its parent has not collected it yet.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _process_namespace() -> str:
    """The host and the namespace within which a process number is unique."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()} without /proc"


def _is_from_gloo(error: RuntimeError) -> bool:
    return any(text in str(error) for text in GLOO_ERROR_TEXTS)
