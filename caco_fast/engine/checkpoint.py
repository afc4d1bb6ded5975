"""Checkpoints: complete or absent, the last few and the best; and the random states that they hold.

A checkpoint is a `torch.save` archive of `{"format", "version", "step", "state"}`. The state is limited to tensors and
plain Python values, so that it loads with `weights_only=True`: a checkpoint from elsewhere can't run code. A file that
can't be used is refused with a line that names an intact checkpoint to resume from.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caco_fast.distributed import all_gather_objects, rank, world_size
from caco_fast.errors import UserError
from caco_fast.storage import TEMPORARY, atomic_write, atomic_write_text, remove_leftovers, sync_folder

FORMAT = "caco_fast checkpoint"
# Version 2 names the phase of a run as the method does.
VERSION, READ_VERSIONS = 2, (1, 2)
# {step: epochs ended}, of checkpoints that were written before the kNN of their epoch.
EPOCHS_FILE = "epochs_ended.json"

log = logging.getLogger(__name__)


class CheckpointWriteError(UserError):
    """A checkpoint that could not be written; the earlier ones are intact."""


class CheckpointStore:
    """The checkpoints of one run: `step_00001234.pt` for the last `keep` saves, `best.pt` with `best.json`, and
    `epoch_0050.pt`, ... that stay for good.

    A checkpoint is written before the kNN at the end of its epoch, so that nothing is lost if that fails, and a note in
    `epochs_ended.json` after it, in place of the same gigabytes again. `load` puts the note into the state's position.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: found {keep}, expected at least 1")
        self.folder = Path(folder)
        self.keep = keep
        remove_leftovers(self.folder)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write the state of `step`, then prune. Raises CheckpointWriteError if the disk is full or read-only."""
        path = self.path_of(step)
        with _writing(path):
            self._forget_epochs(step)
            self._write(path, state, step)
        self._prune(step)
        return path

    def path_of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def note_epoch(self, step: int, epochs_ended: int) -> Path:
        """Note that the kNN after `step` is done too, and return that checkpoint."""
        path = self.path_of(step)
        with _writing(path):
            self._write_epochs(_epochs_ended(self.folder) | {str(step): epochs_ended})
        return path

    def _forget_epochs(self, step: int) -> None:
        """Drop the notes from `step` on: the run was resumed from before them."""
        noted = _epochs_ended(self.folder)
        kept = {at: ended for at, ended in noted.items() if int(at) < step}
        if kept != noted:
            self._write_epochs(kept)

    def _write_epochs(self, noted: dict[str, int]) -> None:
        atomic_write_text(self.folder / EPOCHS_FILE, json.dumps(noted) + "\n")

    def save_best(self, source: Path | dict[str, Any], step: int, score: float) -> bool:
        """Keep `source` (a checkpoint just saved, or a state) as `best.pt` if its score is the highest so far.

        A `best.pt` of a later step does not count: the run was resumed from before it. Returns whether `source` was
        kept.
        """
        kept = self.best()
        if math.isnan(score) or (kept is not None and kept[0] <= step and kept[1] >= score):
            return False
        self._keep_best(source, step, score)
        return True

    def save_newest_as_best(self, source: Path, step: int) -> None:
        """Keep `source` as `best.pt` in a run without scores. A scored `best.pt` stays, unless it is of a later step.

        Later scores replace it.
        """
        kept = self.best()
        if kept is None or kept[0] > step:
            self._keep_best(source, step, None)

    def _keep_best(self, source: Path | dict[str, Any], step: int, score: float | None) -> None:
        path = self.folder / "best.pt"
        with _writing(path):
            if isinstance(source, dict):
                self._write(path, source, step)
            else:
                _link(source, path)
            atomic_write_text(self.folder / "best.json", json.dumps({"step": step, "score": score}) + "\n")

    def save_milestone(self, source: Path, epoch: int) -> None:
        """Keep the checkpoint `source`, just saved, as `epoch_0050.pt` too, which is never pruned.

        Those of later epochs are removed: the run was resumed from before them.
        """
        path = self.folder / f"epoch_{epoch:04d}.pt"
        with _writing(path):
            _link(source, path)
            for other in self.folder.glob("epoch_*.pt"):
                match = re.fullmatch(r"epoch_(\d+)\.pt", other.name)
                if match and int(match[1]) > epoch:
                    other.unlink(missing_ok=True)

    def best(self) -> tuple[int, float] | None:
        """Step and score of `best.pt`, None if there is none or nothing was scored."""
        try:
            kept = json.loads((self.folder / "best.json").read_text())
            return int(kept["step"]), float(kept["score"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def latest(self) -> Path | None:
        found = checkpoints_in(self.folder)
        return found[-1][1] if found else None

    def load(self, path: Path) -> dict[str, Any]:
        """`load_state`, for callers that have the store."""
        return load_state(path)

    def _write(self, path: Path, state: dict[str, Any], step: int) -> None:
        require_plain(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            _save_archive({"format": FORMAT, "version": VERSION, "step": step, "state": state}, file)

    def _prune(self, step: int) -> None:
        """Remove all but the last `keep` up to `step`, and the later ones: the run was resumed from before them."""
        found = checkpoints_in(self.folder)
        until_now = [path for at, path in found if at <= step]
        for path in until_now[: -self.keep] + [path for at, path in found if at > step]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("old checkpoint %s could not be removed: %s", path, error.strerror or error)


def load_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU, mapped from the file instead of read into memory.

    Raises UserError if the file is missing, empty, truncated, damaged, foreign or of a newer version. The line names
    the newest intact checkpoint before it and the option that resumes from there.
    """
    path = Path(path)
    try:
        payload = _read(path)
    except _Unusable as reason:
        raise UserError(f"checkpoint {path} {reason}; {_alternative_to(path)}") from None
    state = payload["state"]
    if (ended := _epochs_ended(path.parent).get(str(payload["step"]))) is not None:
        state["position"]["epochs_ended"] = ended
    return state


def resolve_resume(mode: str, store: CheckpointStore) -> Path | None:
    """The checkpoint that `--resume MODE` means: `auto` the latest if there is one, `never` none, else the path itself.

    No file is read here, and there is no silent fallback: `load` refuses a damaged latest one and names the one before.
    """
    if mode == "never":
        return None
    if mode == "auto":
        return store.latest()
    path = Path(mode)
    if path.is_file():
        return path
    latest = store.latest()
    known = f"the latest of this run is {latest}" if latest else f"{store.folder} holds no checkpoint"
    what = "is a folder" if path.is_dir() else "does not exist"
    raise UserError(f"--resume {mode}: {what}, expected auto, never or the path of a checkpoint; {known}")


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the step checkpoints, in order of steps."""
    matches = ((re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in folder.glob("step_*.pt"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def require_plain(value: Any, where: str = "state") -> None:
    """Raise TypeError with the key of the first value that `weights_only=True` would refuse to load."""
    if type(value) in (int, float, str, bool, type(None), torch.Tensor, torch.nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(
                    f"checkpoint {where}: found a key {key!r} of type {type(key).__name__}, expected str or int"
                )
            require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            require_plain(item, f"{where}[{position}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"checkpoint {where}: found {kind}, expected a tensor, dict, list, tuple, int, float, str, bool or None"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError(
            f"checkpoint {path} could not be written: {error.strerror or error}; earlier checkpoints in {path.parent} "
            "are intact, make room and resume with --resume auto"
        ) from error


def _link(source: Path, path: Path) -> None:
    """Give `path` the contents of `source`, atomically: by a hard link, or by a copy if links are not supported."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
        # Renaming a link to another link of the same file does nothing, and the first one remains.
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError:
        with open(source, "rb") as original, atomic_write(path) as copy:
            shutil.copyfileobj(original, copy)


class _Unusable(Exception):
    """The reason why a file is no usable checkpoint, as the end of a sentence that begins with its name."""


def _save_archive(payload: dict[str, Any], file: Any) -> None:
    """Call torch.save and raise the OSError of a failed write, which torch's writer hides in a RuntimeError."""
    try:
        torch.save(payload, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if not start:
            raise _Unusable("is empty")
        if start != b"PK\x03\x04":
            raise _Unusable("is not a caco_fast checkpoint")
        # torch does not check checksums when it reads.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise _Unusable(f"is damaged (checksum of {damaged})")
    except OSError as error:
        raise _Unusable(f"can't be read ({error.strerror or error})") from None
    except _Unusable:
        raise
    except Exception:
        # zipfile raises many kinds of errors for a damaged directory: encryption, compression, text encoding.
        raise _Unusable("is truncated or damaged") from None
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        raise _Unusable("is not a caco_fast checkpoint (it holds more than tensors and plain values)") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT or "state" not in payload:
        raise _Unusable("is not a caco_fast checkpoint")
    if payload.get("version") not in READ_VERSIONS:
        raise _Unusable(
            f"has format version {payload.get('version')}, this caco_fast reads {VERSION} and older: update caco_fast"
        )
    return payload


def _epochs_ended(folder: Path) -> dict[str, int]:
    try:
        noted = json.loads((folder / EPOCHS_FILE).read_text())
        return {str(int(step)): int(ended) for step, ended in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Without the note a resumed run computes the kNN of that epoch again.
        return {}


def _alternative_to(path: Path) -> str:
    """The advice for a user who can't resume from `path`: the newest intact checkpoint before it, or a new run."""
    own = re.fullmatch(r"step_(\d+)\.pt", path.name)
    before = [other for at, other in checkpoints_in(path.parent) if other != path and (not own or at < int(own[1]))]
    for other in [*reversed(before), path.parent / "best.pt"]:
        if other == path:
            continue
        try:
            _read(other)
        except _Unusable:
            continue
        return f"the newest intact one is {other}: resume from it with --resume {other}"
    return f"no other intact checkpoint is in {path.parent}: start again with --resume never in another run folder"


def load_parts(parts: Mapping[str, Any], scaler: torch.amp.GradScaler, state: dict[str, Any], name: str) -> None:
    """Load the parts of a state into the objects of these names, and the loss scale, if both runs have one.

    Raises:
        UserError: other shapes than those of the checkpoint, which is called `name`.
    """
    targets = dict(parts)
    # With another precision a run has a loss scale and the one before it had none, or the reverse.
    if bool(state["scaler"]) == scaler.is_enabled():
        targets["scaler"] = scaler
    elif state["scaler"]:
        log.warning("%s has a loss scale (fp16), which this precision does not need", name)
    else:
        log.warning("%s has no loss scale, so that of fp16 starts anew", name)
    for part, target in targets.items():
        try:
            target.load_state_dict(state[part])
        except (RuntimeError, ValueError, KeyError, UserError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{name} does not fit this configuration ({part}: {reason}); choose another run.folder, "
                "or the settings it was made with, which are in config.yaml there"
            ) from None


def capture_random_states() -> list[dict[str, Any]]:
    """The generators of every rank, in rank order and on all ranks, as plain values and tensors.

    They are those of Python, numpy, torch on the CPU, and torch on every CUDA device if CUDA is in use.
    """
    name, key, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    own = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(key, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached_gaussian),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    return all_gather_objects(own)


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Restore this rank's own generators. With another number of ranks nothing is restored, with a warning."""
    if len(states) == world_size():
        _restore_random_state(states[rank()])
    elif rank() == 0:
        log.warning(
            "random states: saved by %d ranks, found %d; training continues, not bit for bit", len(states), world_size()
        )


def _restore_random_state(state: dict[str, Any]) -> None:
    """Restore one rank's generators. With another number of CUDA devices, restore those that both have and warn."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, key, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    # Copies, because the state may be mapped from a file that will be removed.
    torch.set_rng_state(state["torch"].clone())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state["cuda"] and len(state["cuda"]) != devices:
        log.warning(
            "random states: saved for %d CUDA devices, found %d; training continues, not bit for bit",
            len(state["cuda"]),
            devices,
        )
    for device, saved in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(saved.clone(), device)
