"""The benchmark of whole steps: its released step does what CaCo's formulas say, its figures are of the work named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caco_fast.config import to_yaml
from caco_fast.methods import CaCo
from caco_fast.models import Encoder, EncoderPair
from tests.engine.tiny_run import config
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]

bench_train = load_tool("bench/step")
prove_switches = load_tool("check/switches")
train_steps = load_tool("bench/peers")

CPU = torch.device("cpu")


def test_the_released_step_is_caco(images: Path) -> None:
    """Three steps beside the method on encoders of the same weights and a bank of the same rows."""
    run = config(images, "optimizer={name: sgd, lr: 0.01}")
    released = train_steps.ReleasedStep(run, CPU)
    query = Encoder(*train_steps.copy.deepcopy(released.query))
    pair = EncoderPair(query)
    method = CaCo(run.caco, run.projector.dim)
    method.bank.bank.copy_(released.bank)
    optimizer = train_steps.build_optimizer(run.optimizer, query.parameters(), run.trainer.batch_size)
    losses = []
    for _ in range(3):
        output = method(released.views, pair)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.update(output.rows, 1.0)
        pair.advance_key(train_steps.RATES["key_momentum"])
        losses.append(output.loss.item())
        released()
    assert released.losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(released.bank, method.bank.bank, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(query.parameters(), released.query.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)


def test_phases_count_the_inner_one_alone() -> None:
    phases = train_steps.Phases(CPU)
    with phases("outer"):
        time.sleep(0.02)
        with phases("inner"):
            time.sleep(0.05)
        phases.timed("inner", time.sleep)(0.03)
    assert 0.02 <= phases.seconds["outer"] < 0.06 and 0.08 <= phases.seconds["inner"]


def test_writes_rates_and_splits_of_every_variant(images: Path, tmp_path: Path) -> None:
    settings, output = tmp_path / "tiny.yaml", tmp_path / "result.json"
    settings.write_text(to_yaml(config(images)))
    options = ["--steps", "1", "--rounds", "2", "--warmup", "1", "--batch", "8", "12", "--output", str(output)]
    variants = ["CaCo", bench_train.MOCO, bench_train.LOADED, bench_train.RELEASED]
    bench_train.main(["--config", str(settings), "trainer.cpu_threads=1", *options, "--variants", *variants])
    record = json.loads(output.read_text())
    assert [point["batch"] for point in record["results"]] == [8, 12]
    for point in record["results"]:
        assert list(point["variants"]) == variants
        for result in point["variants"].values():
            assert result["pairs_per_s"] == pytest.approx(1000 * point["batch"] / result["step_ms"]["median"], rel=0.01)
            assert set(train_steps.PHASES) < set(result["split_ms"])
            worked = {name for name, value in result["split_ms"].items() if value > 0}
            assert {"forward", "loss + bank", "backward", "optimiser", "EMA"} <= worked
        # Reading an image takes longer than handing out the same batch again.
        waited = {name: result["split_ms"]["data wait"] for name, result in point["variants"].items()}
        assert waited[bench_train.LOADED] > waited["CaCo"]
    assert record["settings"]["ranks"] == 1 and record["settings"]["overrides"] == ["trainer.cpu_threads=1"]
    table = bench_train.table(record)
    assert table.count("| CaCo as released |") == 2 and "share of the copy" not in table


def test_a_variant_that_fails_is_a_row_and_the_others_are_measured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, output, right = tmp_path / "tiny.yaml", tmp_path / "result.json", bench_train.make
    settings.write_text(to_yaml(config(images)))

    def make(variant: str, *arguments: object) -> object:
        if variant == bench_train.RELEASED:
            raise RuntimeError("out of something\nmore")
        return right(variant, *arguments)

    monkeypatch.setattr(bench_train, "make", make)
    options = ["--steps", "1", "--rounds", "1", "--warmup", "1", "--output", str(output)]
    bench_train.main(["--config", str(settings), *options, "--variants", "CaCo", bench_train.RELEASED])
    record = json.loads(output.read_text())
    found = record["results"][0]["variants"]
    assert found["CaCo"]["pairs_per_s"] > 0 and found[bench_train.RELEASED] == {
        "error": "RuntimeError: out of something"
    }
    assert "| CaCo as released | not measured: RuntimeError: out of something |" in bench_train.table(record)


def test_a_configuration_without_data_is_measured_on_synthetic_views(tmp_path: Path) -> None:
    settings, output = tmp_path / "tiny.yaml", tmp_path / "result.json"
    settings.write_text(to_yaml(config(Path(""), "data.path=")))
    options = ["--steps", "1", "--rounds", "1", "--warmup", "1", "--output", str(output)]
    bench_train.main(["--config", str(settings), *options, "--variants", "CaCo", bench_train.LOADED])
    (point,) = json.loads(output.read_text())["results"]
    assert list(point["variants"]) == ["CaCo"]


def test_mocos_queue_is_as_long_as_cacos_bank(images: Path, tmp_path: Path) -> None:
    settings = tmp_path / "tiny.yaml"
    settings.write_text(to_yaml(config(images, "moco.queue_size=500")))
    step = bench_train.make(bench_train.MOCO, settings, [], 8, CPU, tmp_path)
    assert len(step.trainer.method.queue.queue) == 37
    step.close()


def test_small_configurations_are_variants_with_their_own_settings(tmp_path: Path) -> None:
    quickstart = ["--config", "quickstart", "--methods"]
    assert {bench_train.MOCO, "CaCo", *bench_train.SMALL} == set(bench_train.parse(quickstart).variants)
    step = bench_train.make("small_moco", Path("quickstart"), ["trainer.precision=f32"], 8, CPU, tmp_path)
    assert step.trainer.method.config.temperature == 0.1 and len(step.trainer.method.queue.queue) == 2048
    step()
    step.close()


def test_ratios_are_to_moco_where_the_released_step_is_left_out() -> None:
    def point(*variants: str) -> dict:
        times = {name: {"median": ms, "p20": ms, "p80": ms} for name, ms in zip(variants, (50.0, 100.0))}
        found = {
            name: {"step_ms": step, "pairs_per_s": 1.0, "split_ms": {}, "peak_bytes": 0} for name, step in times.items()
        }
        settings = {"config": "c", "ranks": 1, "threads": 1, "device": "cpu", "resolved": {"trainer.precision": "f32"}}
        record = {"settings": settings, "machine": {"cpu": "cpu"}, "versions": {"torch": "2"}}
        return record | {"results": [{"batch": 8, "variants": found}]}

    table = bench_train.table(point(bench_train.MOCO, "small_moco"))
    assert "| x MoCo |" in table and "| small_moco | 1 | 100.0 (100.0-100.0) | 0.50 |" in table
    assert "| x released |" in bench_train.table(point(bench_train.RELEASED, bench_train.MOCO))


def test_the_floor_is_that_of_resnet50_in_bf16() -> None:
    name = "caco_fast/configs/imagenet_resnet50_200ep_batch1024.yaml"
    assert bench_train.has_floor(bench_train.load_config(ROOT / name, ["trainer.precision=bf16"]))
    assert not bench_train.has_floor(bench_train.load_config(ROOT / name, ["trainer.precision=f32"]))
    assert not bench_train.has_floor(bench_train.load_config(ROOT / "caco_fast" / "configs" / "quickstart.yaml"))


def test_under_torchrun_every_rank_takes_part_and_one_writes(images: Path, tmp_path: Path) -> None:
    settings, output = tmp_path / "tiny.yaml", tmp_path / "result.json"
    settings.write_text(to_yaml(config(images)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(ROOT / "tools" / "bench/step.py"), "--config", str(settings), "--output", str(output)]
    command += ["--steps", "1", "--rounds", "1", "--warmup", "1", "--variants", "CaCo", bench_train.RELEASED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(output.read_text())
    assert record["settings"]["ranks"] == 2
    assert list(record["results"][0]["variants"]) == ["CaCo"] and done.stdout.count("written to") == 1


# prove_switches


def test_a_switch_is_judged_by_what_rounding_does() -> None:
    wanted, moved = [4.0, 4.0, 4.0], [[4.0, 4.0004, 4.004], [4.0, 4.0, 4.0]]
    assert prove_switches.judge([4.0, 4.001, 4.015], wanted, moved)["equal"]
    assert not prove_switches.judge([4.0, 4.002, 4.0], wanted, moved)["equal"]
    assert not prove_switches.judge([4.0001, 4.0, 4.0], wanted, moved)["equal"]


def test_moved_weights_are_each_one_unit_off() -> None:
    weight = torch.nn.Parameter(torch.randn(50))
    before = weight.detach().clone()
    prove_switches.move([weight], seed=1)
    ulp = torch.nextafter(before, torch.full_like(before, torch.inf)) - before
    assert ((weight - before).abs() > 0).all() and ((weight - before).abs() <= ulp).all()


def test_losses_with_and_without_a_switch(images: Path) -> None:
    settings = ("trainer.max_steps=4", "caco.warm_start_steps=2", "evaluation.every_epochs=0")
    wanted = prove_switches.losses(config(images, *settings))
    moved = [prove_switches.losses(config(images, *settings), 1)]
    found = prove_switches.losses(config(images, *settings, "trainer.joint_views=on"))
    assert len(wanted) == 4 and wanted != moved[0]
    assert prove_switches.judge(found, wanted, moved)["largest_difference"] < 1e-3
    other = prove_switches.losses(config(images, *settings, "optimizer.lr=0.1", "caco.temperature=0.1"))
    assert not prove_switches.judge(other, wanted, moved)["equal"]
