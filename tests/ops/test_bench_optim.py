"""The benchmark of EMA and LARS runs, and does not time what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from caco_fast.errors import UserError
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]

bench_optim = load_tool("bench/optim")


@pytest.fixture
def short(monkeypatch):
    """One tensor of each kind in place of an encoder's."""
    few = [torch.Size(shape) for shape in ((8, 3, 3, 3), (16, 8), (16,))]

    class Few(bench_optim.Inputs):
        def __init__(self, device: str, narrow: bool = False) -> None:
            generator = torch.Generator(device).manual_seed(0)
            lists = [[self._draw(shape, generator, device) for shape in few] for _ in range(4)]
            self.params, self.keys, self.velocities, grads = lists
            self.grads = [grads, [grad.clone() for grad in grads]]
            self.flag, self.elements = torch.zeros((), device=device), sum(shape.numel() for shape in few)

    monkeypatch.setattr(bench_optim, "Inputs", Few)


def test_writes_times_of_every_variant_and_part(short, tmp_path):
    output = tmp_path / "bench.json"
    record = bench_optim.measure("cpu", 3, output)
    assert json.loads(output.read_text()) == record
    assert tuple(record["results"]) == bench_optim.ON_CPU
    for result in record["results"].values():
        for part in bench_optim.PARTS:
            assert 0 < result["ms"][part]["p20"] <= result["ms"][part]["median"] <= result["ms"][part]["p80"]
            assert result["gb_per_s"][part] == pytest.approx(
                bench_optim.TRAFFIC[part] * 360 / result["ms"][part]["median"] / 1e6, abs=0.06
            )
    assert bench_optim.table(record).count("\n") == 3 + 2 * len(bench_optim.PARTS)


def test_inputs_are_those_of_an_encoder():
    inputs = bench_optim.Inputs("cpu", narrow=True)
    assert len(inputs.params) == len(inputs.keys) == len(inputs.grads[1]) > 60
    assert any(p.ndim == 4 and not p.is_contiguous() for p in inputs.params)


def test_a_wrong_variant_is_not_timed(short, monkeypatch):
    right = bench_optim.lars_step_

    def wrong(params, grads, velocities, *, backend, **settings):
        right(params, grads, velocities, backend=backend, **settings)
        if backend != "reference":
            velocities[1][3] += 0.1

    monkeypatch.setattr(bench_optim, "lars_step_", wrong)
    result = bench_optim.measure_variant("foreach", bench_optim.Inputs("cpu"), bench_optim.Timer("cpu"), 1)
    assert result["error"].startswith("wrong: lars differs by ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(UserError, match="--device cuda: torch finds no CUDA GPU here"):
        bench_optim.measure("cuda", 1, tmp_path / "bench.json")
