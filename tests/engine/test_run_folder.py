"""A run folder describes its run from the start, and no other run overwrites it."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import caco_fast
from caco_fast import provenance
from caco_fast.engine.run_folder import RunFolder
from caco_fast.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "runs" / "one")
    made.claim()
    yield made
    made.close()


def test_start_writes_what_ran(folder: RunFolder) -> None:
    folder.start("trainer:\n  seed: 1\n")
    logging.getLogger("caco_fast.engine.trainer").info("epoch 1 is done")
    assert folder.config.read_text() == "trainer:\n  seed: 1\n"
    assert folder.checkpoints.is_dir()
    assert re.search(r"^\d{4}-\d\d-\d\d .* INFO epoch 1 is done$", folder.log.read_text(), re.M)
    (start,) = json.loads(folder.environment.read_text())
    assert start["resumed_from"] is None
    assert start["versions"]["python"] == sys.version.split()[0]
    assert start["versions"]["torch"] and start["versions"]["caco_fast"] == caco_fast.__version__
    assert start["machine"]["cpu_cores"] >= 1
    assert sys.argv[0] in start["command"]
    assert {"started", "commit", "dirty"} <= start.keys()


def test_new_run_in_a_used_folder_is_refused_with_both_ways_out(folder: RunFolder) -> None:
    folder.start("a: 1\n")
    folder.metrics.write_text('{"step": 1, "epoch": 0}\n')
    with pytest.raises(UserError, match=r"already holds a run.*--resume auto, or choose another folder"):
        RunFolder(folder.path).claim(resume="never")
    assert folder.config.read_text() == "a: 1\n"


def test_new_run_in_an_empty_folder_is_fine(folder: RunFolder) -> None:
    folder.claim(resume="never")


def test_resume_adds_an_entry_and_continues_the_log(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("caco_fast.test")
    folder.start("a: 1\n")
    log.info("first")
    folder.start("a: 1\n", resumed_from=Path("checkpoints/step_00000005.pt"))
    log.info("second")
    starts = json.loads(folder.environment.read_text())
    assert [start["resumed_from"] for start in starts] == [None, "checkpoints/step_00000005.pt"]
    assert [line.split()[-1] for line in folder.log.read_text().splitlines()] == ["first", "second"]
    assert sorted(os.listdir(folder.path)) == [".lock", "checkpoints", "config.yaml", "environment.json", "log.txt"]


def test_changed_configuration_keeps_the_earlier_one(folder: RunFolder) -> None:
    for number in (1, 2, 3):
        folder.start(f"a: {number}\n")
    texts = [(folder.path / name).read_text() for name in ("config.1.yaml", "config.2.yaml", "config.yaml")]
    assert texts == ["a: 1\n", "a: 2\n", "a: 3\n"]
    assert "WARNING the configuration differs" in folder.log.read_text()


def as_job(patch: pytest.MonkeyPatch, kind: str, name: str, restarts: int) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        patch.delenv(variable, raising=False)
    names = {"torchrun": "TORCHELASTIC_RUN_ID", "slurm": "SLURM_JOB_ID"}
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
    patch.setenv(names[kind], name)
    patch.setenv(counts[kind], str(restarts))


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
def test_only_a_restart_of_the_job_that_began_the_run_continues_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    as_job(monkeypatch, kind, "job 1", 0)
    folder.start("a: 1\n")
    folder.metrics.write_text('{"step": 1, "epoch": 0}\n')
    found = {}
    for name, restarts in (("job 1", 0), ("job 1", 1), ("job 2", 0), ("job 2", 1)):
        as_job(monkeypatch, kind, name, restarts)
        found[name, restarts] = RunFolder(folder.path).resume_in_restart("never", None)
    assert [start for start, resume in found.items() if resume == "auto"] == [("job 1", 1)]
    as_job(monkeypatch, kind, "job 2", 0)
    folder.start("a: 1\n")
    as_job(monkeypatch, kind, "job 1", 1)
    assert folder.resume_in_restart("never", None) == "never"


def test_torchrun_without_an_id_is_known_by_its_process(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    as_job(monkeypatch, "torchrun", "none", 0)
    folder.start("a: 1\n")
    as_job(monkeypatch, "torchrun", "none", 1)
    assert folder.resume_in_restart("never", None) == "auto"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert folder.resume_in_restart("never", None) == "never"


def test_a_restart_of_a_start_from_a_path_takes_what_was_written_since(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_job(monkeypatch, "slurm", "7", 0)
    left, written = folder.checkpoints / "step_00000030.pt", folder.checkpoints / "step_00000020.pt"
    left.write_bytes(b"")
    os.utime(left, (1e9, 1e9))
    folder.start("a: 1\n")
    as_job(monkeypatch, "slurm", "7", 1)
    assert folder.resume_in_restart("elsewhere.pt", None) == "elsewhere.pt"
    assert folder.resume_in_restart("elsewhere.pt", left) == "elsewhere.pt"
    written.write_bytes(b"")
    assert folder.resume_in_restart("elsewhere.pt", written) == "auto"


def test_summary_merges(folder: RunFolder) -> None:
    folder.start("")
    folder.summary({"knn_raw": 72.6, "knn_trained": 70.0})
    folder.summary({"knn_trained": 77.9})
    assert json.loads(folder.summary_file.read_text()) == {"knn_raw": 72.6, "knn_trained": 77.9}


def test_path_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run can't be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").claim()


def test_close_ends_the_log(folder: RunFolder) -> None:
    folder.start("")
    folder.close()
    logging.getLogger("caco_fast").info("too late")
    assert folder.log.read_text() == ""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "caco_fast"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    # Inside a checkout that does not track the package, such as another project's with a .venv in it.
    assert provenance.commit() == {"commit": None, "dirty": None}
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert provenance.commit() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = True\n")
    assert provenance.commit()["dirty"] is True
