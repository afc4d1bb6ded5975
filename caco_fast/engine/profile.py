"""A trace of some steps by torch.profiler, for chrome://tracing or ui.perfetto.dev."""

import logging
import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from caco_fast.distributed import rank
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.trainer")


def steps_to_profile(text: str) -> tuple[int, int] | None:
    """Read FIRST:LAST; None for an empty text.

    Raises:
        UserError: it is something else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"trainer.profile: found '{text}', expected FIRST:LAST, steps of the run from 1, such as 20:24")
    return first, last


class Profiler:
    """A recorder of the steps of `trainer.profile`, counted as in metrics.jsonl, with the wait for their images.

    Rank 0 alone records. The trainer reports each step that is done to `after`, and the end of the run to `close`.
    """

    def __init__(self, text: str, folder: Path, device: torch.device) -> None:
        steps = steps_to_profile(text)
        self.steps = steps if rank() == 0 else None
        self.folder = folder
        self.device = device
        self._running: profile | None = None

    def after(self, step: int) -> None:
        """Begin or end the trace, if step `step` is the last one before or in it. 0: before the first step."""
        if self.steps is None:
            return
        first, last = self.steps
        if self._running is None and first - 1 <= step < last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._running = profile(activities=activities, acc_events=True)
            self._running.__enter__()
        elif step >= last:
            self.close()

    def close(self) -> None:
        """Write the trace, if it was begun."""
        if self._running is None or self.steps is None:
            return
        running, self._running = self._running, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        running.__exit__(None, None, None)
        path = self.folder / "profile_{}_{}.json.gz".format(*self.steps)
        try:
            running.export_chrome_trace(str(path))
            log.info("trace of the steps %d to %d: %s", *self.steps, path)
        except OSError as error:
            log.warning("%s can't be written: %s", path, error.strerror or error)
