"""How a long protocol continues after a stop: its state on the disk, and the end at a signal."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from caco_fast.distributed import broadcast_object, rank
from caco_fast.engine.agreement import on_rank_0
from caco_fast.engine.ranks import Interrupt, Interrupted
from caco_fast.errors import UserError
from caco_fast.storage import atomic_write

log = logging.getLogger("caco_fast.evaluation")

# A protocol that ends an epoch every moment would write all the time.
SECONDS = 30.0


class Resumable:
    """The state of one protocol with one set of settings; every rank holds one."""

    def __init__(self, name: str, folder: Path, key: dict[str, Any]) -> None:
        """key: all that the state depends on. Another key has another file, so no state of other settings is read."""
        self.name = name
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
        # Ranks that differ here would wait for each other in different places.
        self.path = folder / f"{name}-{broadcast_object(digest)}.state"
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of an earlier start, None if there is none (collective).

        Raises:
            UserError: the file can't be read.
        """

        def read() -> dict[str, Any] | None:
            if not self.path.is_file():
                return None
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"{self.name}: {self.path} can't be read ({reason}); remove it, and the protocol starts anew"
                ) from None

        state = on_rank_0(read)
        if state is not None:
            log.info("%s continues from %s", self.name, self.path)
        return state

    def save(self, state: dict[str, Any], now: bool = False) -> None:
        """Let rank 0 write the state, unless it did a moment ago. A disk that refuses it does not end the protocol."""
        if rank() != 0 or not (now or time.monotonic() - self._saved > SECONDS):
            return
        self._saved = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                torch.save(state, file)
        except OSError as error:
            log.warning("%s: its state can't be written to %s: %s", self.name, self.path, error.strerror or error)

    def stop_if_asked(self, interrupt: Interrupt, state: dict[str, Any], where: str) -> None:
        """Save and end the protocol if a signal asks for it; every rank calls this after every step.

        Raises:
            Interrupted: with the exit status of the signal.
        """
        asked = interrupt.agreed()
        if asked is None:
            return
        self.save(state, now=True)
        raise Interrupted(f"{self.name}: stopped by {asked.name} {where}, and its state is written", 128 + asked.value)

    def finished(self) -> None:
        """Remove the state, which the result replaces."""
        if rank() == 0:
            self.path.unlink(missing_ok=True)
