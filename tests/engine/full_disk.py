"""Train on a file system that fills up: python full_disk.py MOUNT IMAGES, in a mount namespace of its own.

The disk is full from the second step of the first epoch on: until the third epoch in the first run, and until the end
in the second one.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config

SETTINGS = ("trainer.epochs=6", "evaluation.every_epochs=0", "checkpoint.every_steps=5", "run.tensorboard=true")


class CallAtLine(logging.Handler):
    """A handler that calls a function once, when a line of the log begins with a text."""

    def __init__(self, text: str, act: Callable[[], None]) -> None:
        super().__init__()
        self.text, self.act, self.done = text, act, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.done and record.getMessage().startswith(self.text):
            self.done = True
            self.act()


def main(mount: Path, images: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
    filler = mount / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            for size in (2**16, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    logger = logging.getLogger("caco_fast")
    for name, freed in (("freed", True), ("full", False)):
        folder = mount / name
        print(f"== {name}")
        handlers = [CallAtLine("epoch 1/6 step 2/5", fill)] + [CallAtLine("epoch 3/6 step 2/5", filler.unlink)] * freed
        for handler in handlers:
            logger.addHandler(handler)
        try:
            ended = train(config(images, *SETTINGS), folder)["finished"]
        except UserError as error:
            ended = str(error)
        assert all(handler.done for handler in handlers)
        for handler in handlers:
            logger.removeHandler(handler)
        store = CheckpointStore(folder / "checkpoints")
        position = store.load(store.latest())["position"]
        steps = [line["step"] for line in read_metrics(folder)]
        logged = (folder / "log.txt").read_text().count("epoch 6/6 step")
        found = {"ended": ended, "checkpoint": position["total_steps"], "steps": steps, "logged": logged}
        print(f"== found {json.dumps(found)}")
    try:
        train(config(images, *SETTINGS), mount / "another")
    except UserError as error:
        print(f"== refused {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
