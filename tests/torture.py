#!/usr/bin/env python3
"""Runs tools/train.py on bad inputs, in odd environments and under signals: [--only NAME]

Each case is a run as a user would start it, in a process of its own and with a time limit. The program prints the line
that each run ended with. A case fails by a stack trace, a hang or another exit status, or if its words are missing from
the output. A further case is one entry of CASES. Makes and removes a folder for temporary files.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.engine.tiny_run import SETTINGS, write_images

SECONDS = 240.0


class Hang(Exception):
    """A run that did not end within the limit."""


class Place:
    """The folder of one case: `images`, the run folder `run`, and `home`, an empty home folder."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.images = folder, images
        self.run, self.home = folder / "run", folder / "home"
        self.home.mkdir(parents=True)
        self.started: list[Run] = []

    def start(self, *arguments: str, before: Sequence[str] = (), **environment: str) -> "Run":
        """A run of the tiny settings. {folder}, {images} and {home} in arguments stand for these paths."""
        given = {name: str(getattr(self, name)) for name in ("folder", "images", "home")}
        filled = [re.sub(r"\{(folder|images|home)\}", lambda match: given[match[1]], text) for text in arguments]
        command = [*before, sys.executable, str(ROOT / "tools" / "train.py"), *SETTINGS]
        defaults = [f"data.path={self.images}", f"run.folder={self.run}"]
        self.started.append(Run([*command, *defaults, *filled], self.folder, {"HOME": str(self.home), **environment}))
        return self.started[-1]


class Run:
    """A process whose output goes to a file."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="output")
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        self.file = Path(name)
        # A group of its own, so that its workers can be ended with it.
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=descriptor, stderr=descriptor, env=clean, start_new_session=True
        )
        os.close(descriptor)

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def wait_for(self, text: str) -> "Run":
        end = time.monotonic() + SECONDS
        while text not in self.output and self.process.poll() is None:
            if time.monotonic() > end:
                self.end_group()
                raise Hang(f"'{text}' did not come within {SECONDS:.0f} s")
            time.sleep(0.02)
        return self

    def send(self, number: signal.Signals) -> "Run":
        self.process.send_signal(number)
        return self

    def ended(self) -> "Run":
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise Hang(f"no end within {SECONDS:.0f} s") from None
        finally:
            self.end_group()
        return self

    def end_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


How = Callable[[Place], list[Run]]


@dataclass(frozen=True)
class Case:
    """`how` starts the runs and returns those that are judged; all must have the status, and one of them the words."""

    how: How
    status: int
    words: str


def alone(*arguments: str, before: Sequence[str] = (), **environment: str) -> How:
    return lambda place: [place.start(*arguments, before=before, **environment).ended()]


def resumed(*arguments: str, first: Sequence[str] = ("trainer.max_steps=7",)) -> How:
    """Stop after some steps, then resume with these arguments."""

    def how(place: Place) -> list[Run]:
        assert place.start(*first).ended().process.returncode == 0
        return [place.start("--resume", "auto", *arguments).ended()]

    return how


def signalled(number: signal.Signals, *arguments: str) -> How:
    return lambda place: [place.start("trainer.epochs=40", *arguments).wait_for(" step 3/").send(number).ended()]


def killed_and_resumed(place: Place) -> list[Run]:
    place.start("trainer.epochs=40", "checkpoint.every_steps=2").wait_for(" step 3/").send(signal.SIGKILL).ended()
    return [place.start("--resume", "auto", "trainer.epochs=2").ended()]


def second_in_folder(*arguments: str, **environment: str) -> How:
    """Start the same run again while the first one trains; the first one must continue, and stop well when asked."""

    def how(place: Place) -> list[Run]:
        # So long that the first one still trains when the second one has started.
        given = ("trainer.epochs=100000", "evaluation.every_epochs=0", "checkpoint.every_epochs=100", *arguments)
        first = place.start(*given, **environment).wait_for(" step 2/")
        second = place.start(*given, **environment).ended()
        assert first.send(signal.SIGTERM).ended().process.returncode == 143, first.output
        return [second]

    return how


def two_ranks(*of_ranks: Sequence[str]) -> How:
    """Two ranks over gloo, each with its own arguments."""

    def how(place: Place) -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            place.start(*arguments, RANK=str(number), LOCAL_RANK=str(number), **shared)
            for number, arguments in enumerate(of_ranks)
        ]
        return [run.ended() for run in started]

    return how


def with_images(make: Callable[[Path], None], *arguments: str, **environment: str) -> How:
    """A copy of the images that `make` changes, at {folder}/data."""

    def how(place: Place) -> list[Run]:
        make(Path(shutil.copytree(place.images, place.folder / "data")))
        return [place.start("data.path={folder}/data", *arguments, **environment).ended()]

    return how


def patched(code: str, *arguments: str) -> How:
    """Python with some lines that run before the program, such as a system call that another system lacks."""

    def how(place: Place) -> list[Run]:
        (place.folder / "sitecustomize.py").write_text(code)
        path = f"{place.folder}{os.pathsep}{ROOT}"
        return [place.start("trainer.max_steps=1", *arguments, PYTHONPATH=path).ended()]

    return how


def with_file(text: str, *arguments: str) -> How:
    """A configuration file with this text."""

    def how(place: Place) -> list[Run]:
        (place.folder / "own.yaml").write_text(text)
        return [place.start("--config", "{folder}/own.yaml", "trainer.max_steps=1", *arguments).ended()]

    return how


def in_long_tmpdir(place: Place) -> list[Run]:
    folder = place.folder / ("x" * 90)
    folder.mkdir()
    return [place.start("data.workers=2", "trainer.max_steps=1", TMPDIR=str(folder)).ended()]


def cut_checkpoint(place: Place) -> list[Run]:
    place.start("trainer.max_steps=7").ended()
    (newest,) = (place.run / "checkpoints").glob("step_*.pt")
    newest.write_bytes(newest.read_bytes()[:-1000])
    return [place.start("--resume", "auto").ended()]


def of_two_sizes(folder: Path) -> None:
    for split in ("train", "val"):
        Image.new("RGB", (50, 60)).save(folder / split / "cold" / "other.png")


def broken(folder: Path) -> None:
    for path in sorted((folder / "train" / "cold").iterdir())[:3]:
        path.write_bytes(b"no image")


def large(folder: Path) -> None:
    Image.new("L", (20_000, 10_000)).save(folder / "train" / "cold" / "large.png")


def floats(folder: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((40, 40), dtype=np.float32)).save(
        folder / "train" / "cold" / "float.tiff"
    )


def fewer(folder: Path) -> None:
    for path in sorted((folder / "train" / "cold").iterdir())[:3]:
        path.unlink()


VIT = ("backbone.options={}", "backbone={name: vit_tiny_patch16_224, stem: imagenet, options: {depth: 2}}")
NO_FLOCK = (
    "import errno, fcntl\ndef no(*_): raise OSError(errno.ENOSYS, 'Function not implemented')\nfcntl.flock = no\n"
)
NO_FOLDER_SYNC = """import errno, os, stat
sync = os.fsync
def fsync(file):
    if stat.S_ISDIR(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, 'Invalid argument')
    sync(file)
os.fsync = fsync
"""

DONE = "everything is in "
CASES: dict[str, Case] = {
    # Resuming
    "other decay": Case(resumed("optimizer.weight_decay=0.5"), 0, "resuming with another optimizer.weight_decay: 0.5"),
    "other optimiser": Case(resumed("optimizer.name=sgd"), 2, "optimizer.name: found sgd, expected lars"),
    "other shape": Case(resumed("projector.dim=8"), 2, "does not fit this configuration"),
    "other batch": Case(resumed("trainer.batch_size=10"), 2, "in the middle of an epoch"),
    "cut checkpoint": Case(cut_checkpoint, 2, "is truncated or damaged"),
    "no checkpoint": Case(alone("--resume", "/no/such.pt"), 2, "--resume /no/such.pt: does not exist"),
    "killed": Case(killed_and_resumed, 0, "resuming from"),
    "used folder": Case(
        lambda place: [place.start("trainer.max_steps=1").ended() and place.start().ended()], 2, "already holds a run"
    ),
    # Two runs in one folder
    "twice": Case(second_in_folder(), 2, "is in use by process"),
    "twice auto": Case(second_in_folder("--resume", "auto"), 2, "is in use by process"),
    "srun": Case(second_in_folder(SLURM_NTASKS="2"), 2, "start the ranks by torchrun"),
    # Ranks
    "two ranks": Case(two_ranks(["trainer.max_steps=1"], ["trainer.max_steps=1"]), 0, DONE),
    "ranks of other settings": Case(two_ranks([], ["optimizer.lr=1"]), 2, "optimizer.lr: found 1.0 on rank 1"),
    "ranks of other images": Case(
        lambda place: (
            fewer(Path(shutil.copytree(place.images, place.folder / "data")))
            or two_ranks([], ["data.path={folder}/data"])(place)
        ),
        2,
        "training images: found 37 images",
    ),
    "rank without images": Case(two_ranks([], ["data.path=/no/such"]), 2, "on rank 1: .*/no/such"),
    "batch and ranks": Case(two_ranks(*[["trainer.batch_size=9"]] * 2), 2, "can't be shared evenly by 2 ranks"),
    "left WORLD_SIZE": Case(alone(WORLD_SIZE="2"), 2, "WORLD_SIZE"),
    "empty WORLD_SIZE": Case(alone("trainer.max_steps=1", WORLD_SIZE=""), 2, "WORLD_SIZE"),
    "RANK without address": Case(alone(RANK="0", WORLD_SIZE="2"), 2, "MASTER_(ADDR|PORT)"),
    # Signals
    "SIGINT": Case(signalled(signal.SIGINT), 130, "stopped by SIGINT"),
    "SIGTERM": Case(signalled(signal.SIGTERM), 143, "stopped by SIGTERM"),
    "SIGUSR1": Case(signalled(signal.SIGUSR1), 138, "stopped by SIGUSR1"),
    "SIGHUP": Case(signalled(signal.SIGHUP), 129, "stopped by SIGHUP"),
    # Settings
    "no configuration": Case(alone("data.path=", "data.source=folder"), 2, "data.path"),
    "unknown key": Case(alone("optimzer.lr=1"), 2, "did you mean 'optimizer"),
    "unknown method": Case(alone("method=cocoa"), 2, "method: found 'cocoa', expected one of"),
    "wandb.mode=off": Case(alone("wandb.mode=off", "trainer.max_steps=1"), 0, DONE),
    "section twice": Case(with_file("trainer: {seed: 1}\ntrainer: {epochs: 1}\n"), 2, "trainer"),
    "home": Case(alone("run.folder=~/runs/x", "trainer.max_steps=1"), 0, f"{DONE}/.*/home/runs/x"),
    "kernels on a CPU": Case(alone("caco.backend=cuda"), 2, "caco.backend"),
    "diverges": Case(alone("optimizer={name: sgd, lr: 1e30}"), 2, "the loss is -?(nan|inf) at step"),
    "tag of weights": Case(alone("backbone.name=resnet18.a1_in1k"), 2, "backbone\\.init=timm"),
    "vit and small views": Case(alone(*VIT), 2, "img_size|dynamic_img_size"),
    # Images
    "no data": Case(alone("data.path=/no/such/folder"), 2, "/no/such/folder"),
    "fewer images than a batch": Case(alone("trainer.batch_size=64"), 2, "fewer than one batch of 64"),
    "broken images": Case(with_images(broken), 2, "training images can't be read"),
    "large image": Case(with_images(large, "data.bad_image_limit=1", "trainer.max_steps=1"), 0, "data\\.\\w+"),
    "float image": Case(with_images(floats, "trainer.max_steps=1"), 0, DONE),
    "images of two sizes": Case(with_images(of_two_sizes), 2, "eval_resize"),
    # The machine
    "no locks": Case(patched(NO_FLOCK), 0, "has no locks"),
    "no fsync of folders": Case(patched(NO_FOLDER_SYNC), 0, DONE),
    "no affinity": Case(patched("import os\ndel os.sched_getaffinity\n"), 0, DONE),
    "long TMPDIR": Case(in_long_tmpdir, 0, DONE),
    "few descriptors": Case(
        alone("data.workers=2", before=("bash", "-c", 'ulimit -n 26; exec "$@"', "bash")), 2, "ulimit -n"
    ),
}


def judge(case: Case, place: Place) -> tuple[str, list[str]]:
    """The last line of a case, and what is wrong with it."""
    try:
        runs = case.how(place)
    except (Hang, AssertionError) as error:
        return str(error).strip().rpartition("\n")[2], [f"{type(error).__name__}: the case did not get to its end"]
    finally:
        for run in place.started:
            run.end_group()
    outputs = [run.output for run in runs]
    codes = [run.process.returncode for run in runs]
    together = "\n".join(outputs)
    wrong = [f"statuses {codes}, expected {case.status}"] * (set(codes) != {case.status})
    wrong += ["a stack trace"] * ("Traceback (most recent call last)" in together)
    wrong += [f"no words '{case.words}'"] * (re.search(case.words, together) is None)
    said = [line for line in together.splitlines() if re.search(case.words, line)] or together.strip().splitlines()
    return (said or [""])[-1].strip(), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="a case; may be given several times")
    parser.add_argument("--list", action="store_true", help="show the names of the cases, and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return 0
    names = options.only or list(CASES)
    if unknown := set(names) - CASES.keys():
        parser.error(f"--only: no case {', '.join(sorted(unknown))}; --list shows all")
    failed = []
    # A test under nohup would hand its ignored SIGHUP to the runs.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Ends the runs of the present case too, which are in groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="torture") as folder:
        images = write_images(Path(folder) / "images")
        for number, name in enumerate(names):
            begun = time.monotonic()
            line, wrong = judge(CASES[name], Place(Path(folder) / str(number), images))
            verdict = f"FAILED ({'; '.join(wrong)})" if wrong else "ok"
            print(f"{name}: {verdict}, {time.monotonic() - begun:.0f} s\n    {line}", flush=True)
            failed += [name] * bool(wrong)
    print(
        f"{len(names) - len(failed)} of {len(names)} cases are as expected"
        + (f"; not: {', '.join(failed)}" * bool(failed))
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
