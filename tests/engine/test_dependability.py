"""A run that is stopped, killed or out of disk space ends in time, says so once, and can be resumed."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from caco_fast.config import to_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from tests.engine.kill_ranks import moments
from tests.engine.rank_processes import Ranks
from tests.engine.tiny_run import config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("trainer.epochs=6", "evaluation.every_epochs=0", "checkpoint.every_epochs=0")
SETTINGS += ("trainer.collective_timeout=60",)
# CACO_KILLS=20 is the full test, some minutes.
KILLS = int(os.environ.get("CACO_KILLS", "3"))


@pytest.fixture(scope="module")
def file(images, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(to_yaml(config(images, *SETTINGS)))
    return path


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


def ranks_of(file: Path, folder: Path, *arguments: str, ranks: int = 2) -> Ranks:
    return Ranks(
        ranks, folder.with_name(f"output {folder.name}"), "--config", str(file), f"run.folder={folder}", *arguments
    )


def wait_for_step(folder: Path, step: int, running) -> None:
    end = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(folder)):
        assert running() and time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory) -> Path:
    """The run on two ranks that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks = ranks_of(file, folder)
    ranks.wait(120)
    assert ranks.codes == [0, 0], ranks.output()
    return folder


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "term"])
def test_a_signal_to_one_rank_stops_both_at_the_next_step_and_the_run_resumes_bit_for_bit(
    file, tmp_path, whole, number
):
    folder = tmp_path / "run"
    # With log steps far apart, at which the ranks would wait for each other.
    ranks = ranks_of(file, folder, "trainer.log_every=4")
    wait_for_step(folder, 8, ranks.running)
    ranks.send(1, number)
    ranks.wait(60)
    assert ranks.codes == [128 + number] * 2
    assert ranks.output().count("stopped by") == 1 and "error" not in ranks.output(), ranks.output()
    stopped = int(ranks.output().split("after step ")[1].split(";")[0])
    assert 8 < stopped <= 12
    assert CheckpointStore(folder / "checkpoints").latest().name == f"step_{stopped:08d}.pt"
    again = ranks_of(file, folder, "--resume", "auto")
    again.wait(120)
    assert again.codes == [0, 0], again.output()
    assert losses(folder)[-10:] == losses(whole)[-10:]


def test_a_signal_to_loader_workers_too_does_not_cost_the_checkpoint(file, tmp_path):
    """torchrun, SLURM and scancel send it to all processes of a group."""
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config", str(file), f"run.folder={folder}"]
    process = subprocess.Popen(
        [*command, "data.loader=torchvision", "data.workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    wait_for_step(folder, 7, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "stopped by SIGTERM after step" in output and "Traceback" not in output, output
    assert CheckpointStore(folder / "checkpoints").latest()


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(file, tmp_path):
    folder = tmp_path / "run"
    ranks = ranks_of(file, folder, "trainer.collective_timeout=4")
    wait_for_step(folder, 7, ranks.running)
    ranks.send(1, signal.SIGSTOP)
    end = time.monotonic() + 60
    while ranks.codes[0] is None and time.monotonic() < end:
        time.sleep(0.01)
    ranks.send(1, signal.SIGKILL)
    ranks.wait(10)
    assert ranks.codes == [75, -9], ranks.output()
    assert ranks.output().count("error: no answer from rank 1") == 1 and "Traceback" not in ranks.output()


def test_a_rank_killed_at_any_moment_neither_hangs_nor_spoils_the_run(tmp_path):
    found = []
    # On a busy machine a write may end before the kill arrives, so try further moments until one has hit.
    for at in moments(tmp_path, 4 * KILLS):
        found.append(at)
        if len(found) >= KILLS and any(at["leftovers"] for at in found):
            break
    assert all(at["killed"] for at in found if at["in_write"])
    assert any(at["leftovers"] for at in found), "the kills missed the writes"


def test_torchrun_restarts_a_run_by_itself(file, tmp_path, whole):
    """A restart has the arguments of the first start, with which a second start would be refused."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    arguments = [str(ROOT / "tools" / "train.py"), "--config", str(file), f"run.folder={folder}"]
    with open(tmp_path / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [*launch, *arguments, "checkpoint.every_steps=3"],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wait_for_step(folder, 8, lambda: process.poll() is None)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        code = process.wait(timeout=240)
        output.seek(0)
        text = output.read()
    assert code == 0, text
    assert text.count("error: rank 1 is gone, killed or crashed") == 1
    assert "this is a restart of the run in" in text and "resuming from" in text
    assert losses(folder) == losses(whole)


def test_a_restart_does_not_take_over_the_run_of_another_job(file, tmp_path, whole, monkeypatch):
    before = (whole / "metrics.jsonl").read_bytes()
    for name, value in {"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "--config", str(file), f"run.folder={whole}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "already holds a run" in done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "code"),
    [(["optimizer.name=adam"], [2, 2]), (["data.bad_image_limit=0", "data.path=BAD"], None)],
    ids=["on all ranks", "on one rank"],
)
def test_an_error_is_reported_once(file, images, tmp_path, settings, code):
    bad = shutil.copytree(images, tmp_path / "bad")
    next((bad / "train" / "cold").iterdir()).write_bytes(b"no image")
    ranks = ranks_of(file, tmp_path / "run", *[setting.replace("BAD", str(bad)) for setting in settings])
    ranks.wait(60)
    errors = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no answer" not in errors[0] and "Traceback" not in ranks.output(), ranks.output()
    assert code is None or ranks.codes == code
    assert set(ranks.codes) <= {2, 75} and 2 in ranks.codes


def mount_command() -> list[str]:
    """The beginning of a command line that may mount file systems, [] if there is none."""
    for flags in ("-m", "-Urm"):
        script = "mount -t tmpfs tmpfs /mnt"
        if subprocess.run(["unshare", flags, "sh", "-c", script], capture_output=True).returncode == 0:
            return ["unshare", flags]
    return []


@pytest.fixture(scope="module")
def full_disk(images, tmp_path_factory) -> list[list[str]]:
    """The output of two runs on a disk that fills up: one in which it gets room again, one in which it stays full."""
    if not (shutil.which("unshare") and (command := mount_command())):
        pytest.skip("no file system can be mounted here: neither root nor user namespaces")
    place = tmp_path_factory.mktemp("mount")
    script = str(Path(__file__).with_name("full_disk.py"))
    done = subprocess.run(
        [*command, sys.executable, script, str(place), str(images)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    return [part.splitlines() for part in done.stdout.split("== full\n")]


def test_a_disk_full_for_a_while_costs_the_checkpoints_of_that_while(full_disk):
    output = full_disk[0]
    assert sum("training continues without it" in line for line in output) == 4
    assert sum("metrics.jsonl can't be written: No space left" in line for line in output) == 1
    assert sum("metrics.jsonl is written again" in line for line in output) == 1
    assert sum("tensorboard can't be written: No space left" in line for line in output) <= 1
    found = json.loads(output[-1].removeprefix("== found "))
    assert found == {"ended": True, "checkpoint": 35, "steps": list(range(1, 36)), "logged": 5}


def test_a_disk_full_to_the_end_leaves_the_last_good_checkpoint_and_reports_what_is_lost(full_disk):
    output = full_disk[1]
    found = json.loads(next(line for line in output if line.startswith("== found ")).removeprefix("== found "))
    assert found["ended"].startswith("the run ended without its last checkpoint") and found["checkpoint"] == 5
    assert any("summary.json can't be written" in line and "'steps': 35" in line for line in output)
    (lost,) = (line for line in output if "metrics.jsonl" in line and "lines are lost" in line)
    assert f"{35 - len(found['steps'])} lines are lost" in lost
    assert output[-1].startswith("== refused run folder") and "No space left on device" in output[-1]


def test_a_closed_terminal_leaves_a_checkpoint_and_status_129(file, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config", str(file), f"run.folder={folder}"]
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(theirs)
    wait_for_step(folder, 7, lambda: process.poll() is None)
    os.close(ours)
    assert process.wait(60) == 129
    assert CheckpointStore(folder / "checkpoints").latest()
