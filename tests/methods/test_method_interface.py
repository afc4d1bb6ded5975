"""Methods with needs of their own train behind the unchanged trainer, on two ranks as on one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caco_fast.distributed import all_reduce_sum, rank, world_size
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.step import Rates
from caco_fast.errors import UserError
from caco_fast.methods import METHODS, Method, MoCoConfig, build_method, register
from caco_fast.models import segment_batch_norm
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images
from tests.methods.small_methods import Keyless, Temperature, add_methods, remove_methods
from tests.methods.stand_ins import sgd_step, small_pair
from tests.ranks import run_ranks

B, C = 12, 5
CASES = {
    "predictor": ("predicting",),
    "no key encoder, two forwards": ("keyless",),
    "second BatchNorm set over moco": ("adversarial",),
}
SETTINGS = ("optimizer={name: sgd, lr: 0.05}", "evaluation.every_epochs=0", "trainer.epochs=2")
SETTINGS += ("run.tensorboard=false", "run.report=false")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    add_methods()
    yield
    remove_methods()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def run(images: Path, folder: Path, method: str, *settings: str, resume: str = "never") -> dict[str, Any]:
    return train(config(images, f"method={method}", *SETTINGS, *settings), folder, resume)


def state_of(folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder / "checkpoints")
    return store.load(store.latest())


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def steps(name: str) -> dict[str, Tensor]:
    """Losses and state after ten steps of this rank's share of the batches."""
    torch.manual_seed(0)
    registered = METHODS[name].method
    pair = small_pair(C, key_encoder=registered.key_encoder, norm_sets=registered.norm_sets)
    sections = {method: entry.config() for method, entry in METHODS.items()} | {"moco": MoCoConfig(queue_size=11)}
    method = segment_batch_norm(build_method(name, C, sections))
    step = sgd_step(method, pair)
    step.enter(method.phases(B)[-1])
    found = []
    for _ in range(10):
        views = [torch.randn(B, 3, 2, 2).chunk(world_size())[rank()] for _ in range(2)]
        step.interval.clear()
        step(views, Rates(0.05, 0.99, 1.0))
        found.append(all_reduce_sum(step.interval.sums["loss"].clone()) / world_size())
    return {"losses": torch.stack(found), **pair.state_dict(), **method.state_dict()}


def all_steps() -> dict[str, dict[str, Tensor]]:
    add_methods()
    return {case: steps(*arguments) for case, arguments in CASES.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(all_steps, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(case: str, two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    """To the rounding of f32 sums in another order."""
    wanted = steps(*CASES[case])
    for found in two_ranks:
        assert found[case].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[case][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def run_in_ranks(images: Path, folder: Path, method: str) -> None:
    add_methods()
    run(images, folder, method)


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_two_ranks_keeps_them_equal(case: str, images: Path, tmp_path: Path) -> None:
    """Each checkpoint compares the ranks; the state is that of one rank's run, by its names and shapes."""
    (method,) = CASES[case]
    run(images, tmp_path / "one", method)
    run_ranks(run_in_ranks, 2, images, tmp_path / "two", method)
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert losses(tmp_path / "two")[:2] == pytest.approx(losses(tmp_path / "one")[:2], rel=1e-4)
    for part in ("encoders", "method"):
        assert {name: value.shape for name, value in one[part].items()} == {
            name: value.shape for name, value in two[part].items()
        }


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_continues_bit_for_bit(case: str, images: Path, tmp_path: Path) -> None:
    (method,) = CASES[case]
    run(images, tmp_path / "whole", method)
    run(images, tmp_path / "parts", method, "trainer.max_steps=3")
    run(images, tmp_path / "parts", method, resume="auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def first_state(images: Path, folder: Path, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoders and method after one step and after the run."""
    run(images, folder, method, "trainer.max_steps=1")
    before = state_of(folder)
    run(images, folder, method, resume="auto")
    after = state_of(folder)
    return ({**before["encoders"], **before["method"]}, {**after["encoders"], **after["method"]})


def test_layers_of_a_method_are_trained_and_kept(images: Path, tmp_path: Path) -> None:
    before, after = first_state(images, tmp_path, "predicting")
    names = [name for name in after if name.startswith("predictor.")]
    assert len(names) == 4 + 5
    assert all(not torch.equal(before[name], after[name]) for name in names)


def test_without_a_key_encoder_none_is_kept(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "keyless")
    assert all(name.startswith("query.") for name in state_of(tmp_path)["encoders"])


def test_a_second_set_of_batch_norms_is_trained_apart_from_the_first(images: Path, tmp_path: Path) -> None:
    before, after = first_state(images, tmp_path, "adversarial")
    further = [name for name in after if ".further." in name]
    assert further and all(name.startswith("query.") for name in further)
    assert all(not torch.equal(before[name], after[name]) for name in further)
    # A clean forward and an adversarial one a step: the first set counts one batch of every step, the other two.
    steps = 10
    assert int(after["query.backbone.bn1.num_batches_tracked"]) == steps
    assert int(after["query.backbone.bn1.further.0.num_batches_tracked"]) == 2 * steps


def test_a_layer_that_the_loss_does_not_use_is_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method Idle: predictor\.0\.weight, .* gets no gradient and would never be"):
        run(images, tmp_path, "idle")


def drift(images: Path, folder: Path) -> str:
    """The line that ends a run in which one rank's weights were changed."""

    def changed(self: Method, *arguments: Any) -> None:
        if rank() == 1:
            next(encoders.query.parameters()).data.add_(1e-3)

    encoders = None

    class Drifting(Keyless):
        def embed(self, views: Any, pair: Any) -> Any:
            nonlocal encoders
            encoders = pair
            return super().embed(views, pair)

        update = changed

    add_methods()
    METHODS["keyless"] = METHODS["keyless"]._replace(method=Drifting)
    try:
        run(images, folder, "keyless")
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_differ_end_the_run_before_the_checkpoint(images: Path, tmp_path: Path) -> None:
    lines = run_ranks(drift, 2, images, tmp_path)
    assert lines[0] == lines[1]
    assert "rank 1 no longer has the weights of rank 0 at step 5 (query encoder)" in lines[0]
    assert not list(tmp_path.glob("checkpoints/*.pt"))


def test_a_name_belongs_to_one_method() -> None:
    with pytest.raises(ValueError, match="method 'moco': MoCo has that name already"):
        register("moco", Temperature, "another one")(Keyless)
    with pytest.raises(UserError, match="method: found 'mocco', expected one of .*caco, .*moco"):
        build_method("mocco", 8, {})


def test_settings_of_a_registered_method_are_read(images: Path, tmp_path: Path) -> None:
    assert config(images, "method=predicting", "predicting.temperature=0.5").predicting.temperature == 0.5
    with pytest.raises(UserError, match="unknown setting 'predicting.temprature'; did you mean 'predicting.temp"):
        config(images, "predicting.temprature=0.5")
