"""An error that several ranks meet at different times leaves on one of them, though the store lives in rank 0."""

import os
import socket
import time

import pytest
import torch.distributed as dist

from caco_fast.engine.one_voice import SaidElsewhere, one_voice
from caco_fast.errors import UserError
from tests.ranks import CONTEXT

SPOKE, SILENT = 10, 11


def _rank(rank: int, port: int, delays: tuple[float, ...]) -> None:
    store = dist.TCPStore("127.0.0.1", port, len(delays), is_master=rank == 0)
    code = 1
    try:
        with one_voice(store, rank, len(delays)):
            time.sleep(delays[rank])
            raise UserError("the same on every rank")
    except UserError:
        code = SPOKE
    except SaidElsewhere:
        code = SILENT
    # As tools/train.py ends a rank, and the store with rank 0.
    os._exit(code)


@pytest.mark.parametrize("delays", [(0.0, 0.6, 1.2), (1.2, 0.6, 0.0), (0.6, 0.0, 1.2)], ids=["0 first", "2", "1"])
def test_the_first_rank_speaks_and_the_later_ones_know(delays: tuple[float, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_rank, args=(rank, port, delays)) for rank in range(len(delays))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [SPOKE, SILENT, SILENT]
