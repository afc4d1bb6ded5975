"""The page of one run or of several, written as a file."""

import base64
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from caco_fast import __version__
from caco_fast.engine.launch import launched
from caco_fast.engine.progress import log_to_console
from caco_fast.errors import UserError
from caco_fast.report import compare, dynamics, headline, origin
from caco_fast.report.page import render
from caco_fast.report.parts import Missing, Part, Picture
from caco_fast.report.pictures import PicturesConfig, picture_parts
from caco_fast.report.run_data import RunData, read_run
from caco_fast.settings import require_at_least, section, setting
from caco_fast.storage import atomic_write_text

log = logging.getLogger("caco_fast.report")

PAGE = Path("report", "index.html")
DATA_URI = re.compile(r"data:image/(?:jpeg|png);base64,([A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class ReportConfig:
    """The settings of `caco-fast report`."""

    out: str = setting("", "file of the page; empty: RUN/report/index.html, of several runs compare.html")
    device: str = setting("auto", "device of the encoder, for the pictures: auto, cpu, cuda or cuda:N")
    cpu_threads: int = setting(0, "threads of CPU operations; 0: OMP_NUM_THREADS, or all cores")
    pictures: PicturesConfig = section(PicturesConfig, "the pictures that need encoder, bank and images")

    def __post_init__(self) -> None:
        require_at_least("cpu_threads", self.cpu_threads, 0)

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def collective_timeout(self) -> int:
        return 600


def report(folders: Sequence[Path], settings: ReportConfig) -> Path:
    """Write the page in a process of its own, as `caco-fast report` does, and return its path."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE: found {os.environ['WORLD_SIZE']}, expected one process; start without torchrun")
    with launched(settings, section="") as device:
        log_to_console()
        return write_report(folders, settings, device)[0]


def write_report(folders: Sequence[Path], settings: ReportConfig, device: torch.device) -> tuple[Path, list[Part]]:
    """Write the page of a run, or of several runs compared, and return its path and its parts.

    Raises:
        UserError: a folder holds no run, or the page can't be written.
    """
    runs = [read_run(folder) for folder in folders]
    several = len(runs) > 1
    path = Path(settings.out).expanduser() if settings.out else folders[0] / PAGE
    if several and not settings.out:
        path = path.with_name("compare.html")
    # Before the pictures, which take their time.
    _make_room(path)
    parts = list(compare.parts(runs, path)) if several else list(parts_of(runs[0], settings.pictures, device))
    title = " and ".join([", ".join(run.name for run in runs[:-1])] * several + [runs[-1].name])
    text = render(title, _subtitle(runs), parts, _footer(runs))
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from None
    return path, parts


def pictures_of(folder: Path, parts: Sequence[Part]) -> dict[str, bytes]:
    """The curves and the JPEG and PNG pictures of a page, by their names in TensorBoard."""
    found = {}
    with suppress(FileNotFoundError):
        found["curves"] = (folder / "curves.png").read_bytes()
    for part in parts:
        contents = [block.content for block in part.blocks if isinstance(block, Picture)]
        for number, data in enumerate(DATA_URI.findall(" ".join(contents)), 1):
            found[f"{part.anchor}/{number}"] = base64.b64decode(data)
    return found


def parts_of(run: RunData, pictures: PicturesConfig, device: torch.device) -> Iterator[Part]:
    """All parts of the page of one run."""
    for make in (headline.headline, dynamics.dynamics, dynamics.training):
        yield _guarded(make, run)
    try:
        yield from picture_parts(run.folder, pictures, device)
    except Exception as error:
        yield _failed("pictures", error)
    for make in (headline.evaluations, dynamics.speed, origin.events, origin.settings, origin.environment):
        yield _guarded(make, run)


def _guarded(make: Callable[[RunData], Part], run: RunData) -> Part:
    """A part of the page, or why it can't be made: a folder of another version may hold anything."""
    try:
        return make(run)
    except Exception as error:
        return _failed(make.__name__, error)


def _failed(name: str, error: Exception) -> Part:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    log.error("report: the part on %s can't be made: %s", name, what)
    return Part(name, name.capitalize(), [Missing(f"this part can't be made ({what})")])


def _subtitle(runs: Sequence[RunData]) -> str:
    kinds = list(dict.fromkeys(run.method for run in runs))
    if len(runs) > 1:
        return f"{len(runs)} runs compared: {', '.join(kinds)}"
    state = "finished" if runs[0].finished else "not finished"
    started = str(runs[0].starts[0].get("started", ""))[:10] if runs[0].starts else ""
    return f"A run of {kinds[0]}, {f'started {started}, ' if started else ''}{state}."


def _footer(runs: Sequence[RunData]) -> str:
    made = time.strftime("%Y-%m-%d %H:%M")
    return f"Made by caco_fast {__version__} on {made} from {', '.join(str(run.folder) for run in runs)}."


def _make_room(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"out: found the folder {path}, expected the name of a file, such as out={path}/page.html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "the folder is read-only")
    except OSError as error:
        raise UserError(_unwritable(path, error)) from None


def _unwritable(path: Path, error: OSError) -> str:
    return f"out: {path} can't be written: {error.strerror or error}; make room there, or choose another out=FILE"
