"""Checkpoints are complete or absent, foreign ones are refused, and none can run code."""

import errno
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import caco_fast.storage
from caco_fast.engine.checkpoint import CheckpointStore, CheckpointWriteError, resolve_resume
from caco_fast.errors import UserError


def state_of(step: int) -> dict:
    return {"weights": torch.full((257, 33), float(step)), "position": {"step": step, "phase": "training"}}


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_state_comes_back_equal(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.randn(3).bfloat16(),
        "plain": [1, 2.5, "three", True, None, (4, float("inf")), OrderedDict(a=1)],
    }
    store = CheckpointStore(tmp_path)
    loaded = store.load(store.save(state, 12))
    assert loaded["plain"] == state["plain"]
    assert torch.equal(loaded["half"], state["half"])
    network.load_state_dict(loaded["network"])
    optimizer.load_state_dict(loaded["optimizer"])
    buffer = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, state["optimizer"]["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    "value, kind",
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (torch.float32, "torch.dtype"),
        (Path("x"), "PosixPath"),
        ({1, 2}, "set"),
    ],
    ids=["numpy-scalar", "numpy-array", "dtype", "path", "set"],
)
def test_value_that_could_not_be_loaded_is_named_when_saving(tmp_path: Path, value: object, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"state\['optimizer'\]\[1\]\['rate'\].*{kind}"):
        CheckpointStore(tmp_path).save({"optimizer": [0, {"rate": value}]}, 1)
    assert files(tmp_path) == []


def test_last_k_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 90, 100, 1000):
        store.save(state_of(step), step)
    assert files(tmp_path) == ["step_00000100.pt", "step_00001000.pt"]
    assert store.latest() == tmp_path / "step_00001000.pt"


def test_nothing_is_pruned_before_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(state_of(1), 1)
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(files(tmp_path)), replace(*paths)))
    store.save(state_of(2), 2)
    assert "step_00000001.pt" in seen[0]
    assert files(tmp_path) == ["step_00000002.pt"]


def test_resuming_before_the_latest_leaves_the_later_ones_behind_at_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        store.save(state_of(step), step)
    store.save(state_of(15), 15)
    assert files(tmp_path) == ["step_00000010.pt", "step_00000015.pt"]
    assert store.latest() == tmp_path / "step_00000015.pt"


def test_best_is_the_highest_score_and_outlives_pruning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    kept = [store.save_best(store.save(state_of(step), step), step, score) for step, score in [(1, 60.0), (2, 70.0)]]
    kept.append(store.save_best(store.save(state_of(3), 3), 3, 65.0))
    kept.append(store.save_best(store.save(state_of(4), 4), 4, float("nan")))
    assert kept == [True, True, False, False]
    assert store.best() == (2, 70.0)
    assert store.load(tmp_path / "best.pt")["position"]["step"] == 2
    assert CheckpointStore(tmp_path).best() == (2, 70.0)
    assert files(tmp_path) == ["best.json", "best.pt", "step_00000004.pt"]


def test_best_on_a_full_disk_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(state_of(3), 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointWriteError, match="best.pt could not be written: No space left"):
            store.save_best(path, 3, 50.0)
    assert store.save_best(path, 3, 50.0) and store.best() == (3, 50.0)


def test_best_of_a_future_left_behind_gives_way(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save_best(state_of(30), 30, 80.0)
    assert store.save_best(state_of(20), 20, 75.0)
    assert store.best() == (20, 75.0)


def test_best_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = CheckpointStore(tmp_path)
    path = store.save(state_of(3), 3)
    assert store.save_best(path, 3, 50.0)
    assert (tmp_path / "best.pt").read_bytes() == path.read_bytes()
    assert files(tmp_path) == ["best.json", "best.pt", "step_00000003.pt"]


KILLER = """
import os, random, signal, sys, time, torch
from pathlib import Path
from caco_fast.engine.checkpoint import CheckpointStore

folder, moments, start, leftovers = Path(sys.argv[1]), random.Random(0), 0, 0
CheckpointStore(folder, keep=2).save({"weights": torch.zeros(400, 500), "step": 0}, 0)
for _ in range(40):
    child = os.fork()
    if child == 0:
        store, step = CheckpointStore(folder, keep=2), start
        while True:
            step += 1
            store.save({"weights": torch.full((400, 500), float(step)), "step": step}, step)
    time.sleep(moments.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    leftovers += any(name.startswith(".") for name in os.listdir(folder))
    store = CheckpointStore(folder, keep=2)
    assert not any(name.startswith(".") for name in os.listdir(folder)), os.listdir(folder)
    state = store.load(store.latest())
    assert state["step"] >= start
    assert torch.equal(state["weights"], torch.full((400, 500), float(state["step"])))
    start = state["step"]
print(start, leftovers)
"""


def test_killed_at_any_moment_the_latest_loads(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved, leftovers = map(int, done.stdout.split())
    # Else the kills missed the writes, and the test showed nothing.
    assert saved > 0 and leftovers > 0


HOLDER = """
import sys, time
from pathlib import Path
from caco_fast.storage import atomic_write
with atomic_write(Path(sys.argv[1]) / "live.pt"):
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_write_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    (tmp_path / ".step_00000001.pt.123.writing").write_bytes(b"half a checkpoint")
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "writing\n"
        assert len(files(tmp_path)) == 2
        CheckpointStore(tmp_path)
        assert files(tmp_path) == [f".live.pt.{child.pid}.writing"]
    finally:
        child.kill()
        child.communicate()
    CheckpointStore(tmp_path)
    assert files(tmp_path) == []


def test_latest_when_truncated_anywhere_is_refused_with_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    before, latest = store.save(state_of(1), 1), store.save(state_of(2), 2)
    whole = latest.read_bytes()
    for length in [0, 1, 3, 4, 30, 100, 1000, len(whole) // 2, len(whole) - 500, len(whole) - 22, len(whole) - 1]:
        latest.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is empty|is truncated|is not a caco_fast") as refusal:
            store.load(store.latest())
        assert str(refusal.value).endswith(f"--resume {before}"), length
        assert "\n" not in str(refusal.value)
    latest.write_bytes(whole)
    assert store.load(latest)["position"]["step"] == 2


def test_a_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(state_of(2), 2)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"is damaged.*no other intact checkpoint is in {tmp_path}"):
        store.load(path)


def test_damage_anywhere_is_one_line_or_harmless(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save({"x": torch.arange(50.0), "step": 7}, 2)
    whole, refused = path.read_bytes(), 0
    # Here and there among the data, and all of the archive's directory behind them.
    for place in [*range(0, len(whole) - 700, 9), *range(len(whole) - 700, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            state = store.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert state["step"] == 7 and torch.equal(state["x"], torch.arange(50.0)), place
    assert refused > 100


def test_offer_passes_over_damaged_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=4)
    paths = [store.save(state_of(step), step) for step in (1, 2, 3, 4)]
    for path in (paths[1], paths[2]):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"--resume {paths[0]}$"):
        store.load(paths[2])


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["pickle", "torch-legacy", "torch-zip", "inside-our-format"])
def test_foreign_pickle_is_refused_and_runs_no_code(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "step_00000001.pt", tmp_path / "owned"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit(target)))
    elif kind == "inside-our-format":
        payload = {"format": "caco_fast checkpoint", "version": 1, "step": 1, "state": Exploit(target)}
        torch.save(payload, path)
    else:
        torch.save({"state_dict": Exploit(target)}, path, _use_new_zipfile_serialization=kind == "torch-zip")
    with pytest.raises(UserError, match="is not a caco_fast checkpoint"):
        CheckpointStore(tmp_path).load(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 not a zip", b"\x89PNG....", b"\n" * 100, b"x"], ids=["zip-like", "png", "blank", "byte"]
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint {path} is (truncated|not a caco_fast checkpoint)"):
        CheckpointStore(tmp_path).load(path)


def test_tensors_of_another_program_are_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, tmp_path / "moco.pt")
    with pytest.raises(UserError, match="is not a caco_fast checkpoint"):
        CheckpointStore(tmp_path).load(tmp_path / "moco.pt")


def test_newer_version_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "caco_fast checkpoint", "version": 3, "step": 1, "state": {}}, tmp_path / "step_00000001.pt")
    with pytest.raises(UserError, match="version 3, this caco_fast reads 2 and older: update"):
        CheckpointStore(tmp_path).load(tmp_path / "step_00000001.pt")


def test_full_disk_leaves_the_earlier_ones_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(state_of(1), 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointWriteError, match="No space left on device; earlier checkpoints in .* are intact"):
            store.save(state_of(2), 2)
    assert files(tmp_path) == ["step_00000001.pt"]
    assert store.load(store.latest())["position"]["step"] == 1


LIMITED = """
import resource, sys, torch
from pathlib import Path
from caco_fast.engine.checkpoint import CheckpointStore, CheckpointWriteError
store = CheckpointStore(Path(sys.argv[1]))
store.save({"x": torch.zeros(1000)}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    store.save({"x": torch.zeros(100_000), "y": torch.zeros(100_000)}, 2)
except CheckpointWriteError as error:
    print(error)
print(store.load(store.latest())["x"].shape)
"""


def test_file_size_limit_of_the_system_is_a_clear_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "step_00000002.pt could not be written: File too large; earlier" in done.stdout
    assert "torch.Size([1000])" in done.stdout
    assert files(tmp_path) == ["step_00000001.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_the_kernels_own_enospc_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path: Path, mode: str) -> object:
        return open("/dev/full" if mode == "wb" else path, mode)

    monkeypatch.setattr(caco_fast.storage, "open", open_full, raising=False)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        CheckpointStore(tmp_path).save({"x": torch.zeros(500_000)}, 1)


def test_resume_auto_never_and_path(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert resolve_resume("auto", store) is None
    first, last = store.save(state_of(1), 1), store.save(state_of(2), 2)
    assert resolve_resume("auto", store) == last
    assert resolve_resume("never", store) is None
    assert resolve_resume(str(first), store) == first


@pytest.mark.parametrize("name, reason", [("gone.pt", "does not exist"), (".", "is a folder")])
def test_resume_from_what_is_no_file_names_the_latest(tmp_path: Path, name: str, reason: str) -> None:
    store = CheckpointStore(tmp_path)
    latest = store.save(state_of(2), 2)
    with pytest.raises(UserError, match=f"{reason}, expected auto, never or the path.*latest of this run is {latest}"):
        resolve_resume(str(tmp_path / name), store)


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read .No such file"):
        CheckpointStore(tmp_path).load(tmp_path / "step_00000009.pt")
