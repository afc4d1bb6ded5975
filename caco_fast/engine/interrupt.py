"""Signals as a request to stop at the next step, with a checkpoint, and on several ranks at the same step."""

import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from caco_fast.distributed import is_distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun and SLURM may both send one Ctrl-C on to the same process.
SAME_KEYSTROKE_SECONDS = 1.0


class Interrupted(Exception):
    """A run stopped on request, after it wrote a checkpoint. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupt:
    """While entered, the first of `SIGNALS` only sets `signal`.

    A later SIGINT acts as usual; a later SIGTERM or SIGUSR1 says nothing new, and what does not end by it is ended by
    SIGKILL. `timeout_s`: how long a rank waits for the others' answers.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        self.signal: signal.Signals | None = None
        self.timeout_s = timeout_s
        self._asked_at = 0.0
        self._before: dict[signal.Signals, object] = {}
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Interrupt":
        self.signal = None
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if self._asked is not None and (kind is None or issubclass(kind, Interrupted)):
            # All ranks have asked it; one that left now would break it off for the others.
            self._asked[0].wait()
            dist.destroy_process_group(self._group)
            self._asked = self._group = None
        if kind is not None and is_distributed():
            # torchrun ends the other ranks once one is gone; first they say why they end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agreed(self) -> signal.Signals | None:
        """The signal to stop for, None to go on. Every rank calls after every step, and all get the same.

        With several ranks it is what any of them was sent before the step now done began: the answers travel over
        gloo during a step, so that no rank waits for them and no GPU is synchronised. A rank that is gone shows here at
        the next step, as an error, where a GPU's own collectives would wait for their timeout.
        """
        if not is_distributed():
            return self.signal
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        before, flag = self._asked, torch.tensor([self.signal or 0])
        self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        if before is None:
            return None
        answers, flag = before
        answers.wait()
        return signal.Signals(int(flag)) if flag else None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._asked_at = signal.Signals(number), now
        elif number == signal.SIGINT and now > self._asked_at + SAME_KEYSTROKE_SECONDS:
            self._restore()
            signal.default_int_handler(number, frame)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
