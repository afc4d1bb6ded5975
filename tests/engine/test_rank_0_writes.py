"""With several ranks only rank 0 writes and prints, and each rank gets its own random states back."""

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from caco_fast.engine.checkpoint import CheckpointStore, capture_random_states, restore_random_states
from caco_fast.engine.metrics import MetricsWriter, read_metrics
from caco_fast.engine.progress import Progress, table
from caco_fast.engine.run_folder import RunFolder

RANKS = 2


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        _run(rank, Path(folder, "run"))
    torch.manual_seed(rank)
    states = capture_random_states()
    if rank == 0:
        CheckpointStore(Path(folder)).save({"random": states}, 1)
    dist.barrier()
    before = torch.rand(3)
    restore_random_states(CheckpointStore(Path(folder)).load(Path(folder, "step_00000001.pt"))["random"])
    same = torch.equal(torch.rand(3), before)
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"shown": shown.getvalue(), "same": same, "draw": before.tolist()})
    )
    dist.destroy_process_group()


def _run(rank: int, folder: Path) -> None:
    run = RunFolder(folder)
    run.claim()
    run.start(f"rank: {rank}\n")
    metrics = MetricsWriter(folder, tensorboard=False)
    with Progress(1, 2, 8, log_every=1) as progress:
        progress.start_epoch(0)
        for step in (1, 2):
            progress.step({"loss": 7.0})
            metrics.write(step, {"loss": 7.0 + rank}, epoch=0)
    table("figures", ["what", "value"], [["loss", 7.0]])
    run.summary({f"rank_{rank}": rank})
    metrics.close()
    run.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder of a run on two ranks, and what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    # Forked from a process that has done the imports, which cost more than the test.
    multiprocessing.set_forkserver_preload(["caco_fast.engine.run_folder", "caco_fast.evaluate"])
    mp.start_processes(_rank, args=(str(folder),), nprocs=RANKS, start_method="forkserver")
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_only_rank_0_prints(ranks: tuple[Path, list[dict]]) -> None:
    first, second = (found["shown"] for found in ranks[1])
    assert first.count("epoch 1/1 step") == 2 and first.count("figures") == 1
    assert second == ""


def test_only_rank_0_writes(ranks: tuple[Path, list[dict]]) -> None:
    folder = ranks[0] / "run"
    assert [line["loss"] for line in read_metrics(folder)] == [7.0, 7.0]
    assert (folder / "config.yaml").read_text() == "rank: 0\n"
    assert len(json.loads((folder / "environment.json").read_text())) == 1
    assert json.loads((folder / "summary.json").read_text()) == {"rank_0": 0}


def test_each_rank_gets_its_own_state_back_from_the_one_checkpoint(ranks: tuple[Path, list[dict]]) -> None:
    assert [found["same"] for found in ranks[1]] == [True, True]
    assert ranks[1][0]["draw"] != ranks[1][1]["draw"]
