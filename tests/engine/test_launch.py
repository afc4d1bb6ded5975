"""What the environment says about ranks and threads: complete, absent, or left over and refused in one line."""

import os

import pytest
import torch

from caco_fast.cli import train
from caco_fast.engine import launch
from caco_fast.engine.launch import launched
from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError

CPU = TrainerConfig(device="cpu")
COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without any launcher, whose changes are undone."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return os.environ  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "found, named",
    [
        ({"WORLD_SIZE": "2"}, "RANK: found none"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: found ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: found '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT: found none"),
        ({**COMPLETE, "RANK": "2"}, "RANK: found 2, expected less than WORLD_SIZE=2"),
        ({**COMPLETE, "RANK": "first"}, "RANK: found 'first'"),
        ({**COMPLETE, "MASTER_ADDR": ""}, "MASTER_ADDR: found none"),
        ({**COMPLETE, "MASTER_PORT": "port"}, "MASTER_PORT: found 'port'"),
        ({**COMPLETE, "LOCAL_RANK": ""}, "LOCAL_RANK: found ''"),
        ({**COMPLETE, "LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE: found 'none'"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS: found 2 and no WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE: found 4"),
    ],
)
def test_left_over_variables_are_refused_by_name(environment, found: dict[str, str], named: str) -> None:
    environment.update(found)
    with pytest.raises(UserError) as raised, launched(CPU):
        pass
    assert str(raised.value).startswith(named) and "torchrun" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # A shell of salloc, in which no task was started.
        {"SLURM_NTASKS": "8"},
    ],
)
def test_one_process_needs_no_launcher(environment, found: dict[str, str]) -> None:
    environment.update(found)
    with launched(CPU) as device:
        assert device == torch.device("cpu")


def test_the_command_ends_with_one_line_and_status_2(environment, capsys, tmp_path) -> None:
    environment["WORLD_SIZE"] = "2"
    assert train.main(["--config", "quickstart", f"run.folder={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("error: RANK: found none") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "found, setting, threads",
    [
        ({}, 0, 5),
        ({"OMP_NUM_THREADS": "3"}, 0, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 0, 3),
        ({"OMP_NUM_THREADS": "3"}, 2, 2),
        ({"OMP_NUM_THREADS": "many"}, 0, 5),
        # torchrun itself sets 1.
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "2"}, 0, 5),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "1"}, 0, 1),
    ],
)
def test_threads_follow_the_setting_then_omp_then_the_cores(
    environment, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], setting: int, threads: int
) -> None:
    environment.update(found)
    monkeypatch.setattr(launch, "cores_of_rank", lambda: 5)
    with launched(TrainerConfig(device="cpu", cpu_threads=setting)):
        assert torch.get_num_threads() == threads
