"""Processes that run tools/train.py as ranks over gloo, can be sent signals, and start without the cost of imports."""

import os
import signal
import socket
import sys
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from tests.ranks import CONTEXT


class Ranks:
    """A set of running ranks, whose output goes to files in `folder`."""

    def __init__(self, ranks: int, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.output_files = [folder / f"rank_{rank}.txt" for rank in range(ranks)]
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_run_as_rank, args=(rank, ranks, port, path, arguments))
            for rank, path in enumerate(self.output_files)
        ]
        for process in self.processes:
            process.start()

    @property
    def codes(self) -> list[int | None]:
        """The exit status of each rank: -n if signal n ended it, None while it runs."""
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        return None in self.codes

    def wait(self, seconds: float) -> float:
        """Wait for all to end and return how long that took. After `seconds`, kill them and raise TimeoutError."""
        begun = time.monotonic()
        while self.running():
            if time.monotonic() > begun + seconds:
                codes = self.codes
                for process in self.processes:
                    process.kill()
                raise TimeoutError(f"after {seconds} s the ranks' codes were {codes}:\n{self.output()}")
            time.sleep(0.005)
        return time.monotonic() - begun

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def output(self) -> str:
        return "".join(path.read_text() for path in self.output_files)


def _run_as_rank(rank: int, ranks: int, port: int, output: Path, arguments: tuple[str, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = ["train.py", *arguments]
    import train

    from caco_fast.engine import step

    assert step.DistributedDataParallel is DistributedDataParallel, "it is wrapped elsewhere: patch it there"
    step.DistributedDataParallel = _LastingBuckets
    train.leave(train.main())


class _LastingBuckets(DistributedDataParallel):
    """DistributedDataParallel that keeps the layout of its buckets, so that a resumed run can be equal bit for bit.

    Usually it changes the layout after the first step of a process, and gloo then sums the gradients of three ranks in
    another order. It keeps the layout if it looks for unused parameters.
    """

    def __init__(self, module: Any, **options: Any) -> None:
        warnings.filterwarnings("ignore", message="find_unused_parameters=True")
        super().__init__(module, **{**options, "find_unused_parameters": True, "static_graph": False})
