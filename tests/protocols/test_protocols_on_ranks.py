"""Linear, linear_cached and fine-tuning give on two and three ranks what they give on one."""

from pathlib import Path

import pytest

from caco_fast.distributed import rank
from tests.protocols.small import SmallContext, evaluate
from tests.ranks import run_ranks

OF_HEADS = ("preset=moco", "batch_size=12", "epochs=2", "milestones=[1]", "lr=0.5", "lrs=[0.1,1]", "held_out=7")
PROTOCOLS = {
    "linear": (*OF_HEADS, "norm=true"),
    "linear_cached": (*OF_HEADS, "views=2"),
    "lowshot": ("preset=swav", "per_class=9", "batch_size=12", "epochs=2", "milestones=[1]", "lr=0.05", "head_lr=0.4"),
}


def on_a_rank(folder: Path) -> dict:
    found = {}
    for name, settings in PROTOCOLS.items():
        result = evaluate(SmallContext(folder), name, *settings)
        found[name] = {"metrics": result.metrics, "sweep": result.sweep, "counts": result.counts}
    return found | {"rank": rank()}


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> dict:
    return on_a_rank(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_give_what_one_gives(tmp_path, of_one, ranks):
    for number, found in enumerate(run_ranks(on_a_rank, ranks, tmp_path)):
        assert found["rank"] == number
        for name in PROTOCOLS:
            assert found[name]["metrics"] == pytest.approx(of_one[name]["metrics"], abs=1e-6)
            assert found[name]["counts"] == of_one[name]["counts"]
            for row, expected in zip(found[name]["sweep"], of_one[name]["sweep"], strict=True):
                assert row == pytest.approx(expected, rel=1e-4)
