"""Released checkpoints of CaCo and AdCo that a run continues from, compared with their own way to take a step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.build import build_trainer, settled
from caco_fast.config import Config
from caco_fast.engine.checkpoint import CheckpointStore, load_state
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.step import Rates
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.models import build_backbone, build_projector
from caco_fast.training import _import, train
from tests.engine import tiny_run
from tests.ranks import run_ranks

K, C = 37, 16
COMMON = [
    "optimizer={name: sgd, lr: 0.05, scale_lr: false, momentum: 0.9, weight_decay: 1e-4}",
    "data.source=folder",
    "evaluation.every_epochs=0",
    "evaluation.linear_probe=false",
    "trainer.epochs=3",
    "schedule.key_momentum=0.9",
]
OF_METHOD = {
    "caco": ["method=caco", "projector={layers: 3}", "caco.bank_lr=0.5"],
    "adco": ["method=adco", "projector={layers: 2, batch_norm: false, bias: true}", "adco.bank_lr=0.5"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_images(tmp_path_factory.mktemp("images"), train=12, test=2)


def config_of(method: str, images: Path, *more: str) -> Config:
    return tiny_run.config(images, *COMMON, *OF_METHOD[method], *more)


def modules(config: Config) -> torch.nn.Module:
    """An encoder as the releases have it: a backbone with the head as `fc`."""
    backbone = build_backbone(config.backbone, channels=3)
    backbone.fc = build_projector(config.projector, backbone.num_features)
    return backbone.double()


def embed(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    return F.normalize(encoder.fc(encoder.forward_features(images).mean(dim=(2, 3))), dim=1)


def released_tree(config: Config, epoch: int = 1) -> dict[str, Any]:
    """A made-up checkpoint in the released layout, with nothing at its initial value."""
    # With some seeds an activation is 0 but for rounding, so that f32 and f64 differ in a gradient.
    torch.manual_seed(4)
    held: dict[str, Tensor] = {}
    for prefix in ("module.encoder_q.", "module.encoder_k."):
        for key, value in modules(config).float().state_dict().items():
            shaken = value + 5 if value.dtype == torch.int64 else value + 0.05 * torch.rand_like(value)
            held[prefix + key] = shaken
    bank = {"W": 2 * torch.randn(C, K), "v": 0.1 * torch.randn(C, K)}
    return {
        "epoch": epoch,
        "arch": "resnet18",
        "best_acc": 0.0,
        "state_dict": held,
        "optimizer": {},
        "Memory_Bank": bank,
    }


def build(config: Config, folder: Path) -> Trainer:
    config = settled(config, torch.device("cpu"))
    return build_trainer(config, RunFolder(folder), CheckpointStore(folder / "checkpoints"), torch.device("cpu"))


@pytest.mark.parametrize("method", OF_METHOD)
def test_two_steps_from_an_import_are_those_of_the_released_code(method: str, images: Path, tmp_path: Path) -> None:
    config = config_of(method, images)
    tree = released_tree(config)
    torch.save(tree, tmp_path / "w.pth.tar")
    trainer = build(config, tmp_path / "run")
    _import(config, trainer, str(tmp_path / "w.pth.tar"), False)
    assert (trainer.position.phase, trainer.position.step, trainer.position.epochs_ended) == ("training", 3, 1)
    oracle = Oracle(config, tree)
    trainer.encoders.train(), trainer.method.train()
    trainer.step.enter(trainer.phases[-1])
    for step, batch in zip((3, 4), trainer.loader.batches(1, 0)):
        lr, momentum = trainer.schedule.lr_at(step), trainer.schedule.key_momentum_at(step + 1)
        oracle.step([view.double() for view in batch.views], lr, trainer.schedule.key_momentum_at(step))
        trainer.step(batch.views, Rates(lr, momentum, 1.0))
    trainer.close()
    bank = trainer.method.bank
    assert not torch.equal(bank.bank, tree["Memory_Bank"]["W"].T)
    torch.testing.assert_close(bank.bank.double(), oracle.rows.T, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(bank.velocity.double(), oracle.velocity.T, rtol=1e-4, atol=2e-5)
    # The keys of a step come from the mean at its beginning there, and at the end of the step before here.
    oracle.average(trainer.schedule.key_momentum_at(5))
    for encoder, expected in ((trainer.encoders.query, oracle.query), (trainer.encoders.key, oracle.key)):
        found = {f"fc.{name}": value for name, value in encoder.projector.state_dict().items()}
        found |= encoder.backbone.state_dict()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-3, atol=1e-4, msg=name)


class Oracle:
    """Steps in f64 in the released layout: W [C, K], the bank's gradient by autograd of the formula, SGD by hand."""

    def __init__(self, config: Config, tree: dict[str, Any]) -> None:
        self.config, self.settings = config, getattr(config, config.method)
        self.query, self.key = modules(config), modules(config)
        for prefix, encoder in (("module.encoder_q.", self.query), ("module.encoder_k.", self.key)):
            held = {name.removeprefix(prefix): value for name, value in tree["state_dict"].items()}
            encoder.load_state_dict({name: held[name] for name in encoder.state_dict()})
            encoder.train()
        self.rows, self.velocity = (copy.deepcopy(tree["Memory_Bank"][name]).double() for name in "Wv")
        self.momenta = [torch.zeros_like(value) for value in self.query.parameters()]

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        for key, query in zip(self.key.parameters(), self.query.parameters()):
            key.mul_(momentum).add_(query, alpha=1 - momentum)

    def step(self, views: list[Tensor], lr: float, key_momentum: float) -> None:
        self.average(key_momentum)
        rows = self.rows.clone().requires_grad_()
        loss, bank_loss = (self._caco if self.config.method == "caco" else self._adco)(views, rows)
        gradients = torch.autograd.grad(loss, list(self.query.parameters()), retain_graph=True)
        (of_bank,) = torch.autograd.grad(bank_loss, rows)
        settings = self.settings
        self.velocity = settings.bank_momentum * self.velocity + of_bank + settings.bank_weight_decay * self.rows
        self.rows = self.rows - settings.bank_lr * self.velocity
        with torch.no_grad():
            for value, gradient, momentum in zip(self.query.parameters(), gradients, self.momenta):
                momentum.mul_(0.9).add_(gradient + 1e-4 * value)
                value.sub_(lr * momentum)

    def _caco(self, views: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        t, bank_t = self.settings.temperature, self.settings.bank_temperature
        q_a, q_b = (embed(self.query, view) for view in views)
        with torch.no_grad():
            k_a, k_b = (embed(self.key, view) for view in views)
        unit = F.normalize(rows, dim=0)  # [C, K]
        loss, bank_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for query, key in ((q_a, k_b), (q_b, k_a)):
            positive = (key @ unit.detach()).argmax(dim=1)
            loss = loss + F.cross_entropy(query @ unit.detach() / t, positive)
            similarity = query.detach() @ unit
            weight = torch.softmax(similarity.detach() / bank_t, dim=1)
            own = F.one_hot(positive, K)
            bank_loss = bank_loss - ((weight + own * (1 - 2 * weight)) * similarity / bank_t).sum(dim=1).mean()
        return loss, bank_loss

    def _adco(self, views: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        t, bank_t = self.settings.temperature, self.settings.bank_temperature
        query = embed(self.query, views[0])
        with torch.no_grad():
            key = embed(self.key, views[1])
        unit = F.normalize(rows, dim=0)
        logits = torch.cat([query @ key.T, query @ unit.detach()], dim=1)
        loss = F.cross_entropy(logits / t, torch.arange(len(query)))
        similarity = torch.cat([query.detach() @ key.T, query.detach() @ unit], dim=1)
        weight = torch.softmax(similarity.detach() / bank_t, dim=1)
        return loss, -((weight * similarity / bank_t)[:, len(query) :]).sum(dim=1).mean()


def test_an_imported_run_trains_to_its_end_and_resumes(images: Path, tmp_path: Path) -> None:
    config = config_of("caco", images, "trainer.max_steps=4", "optimizer.name=lars")
    tree = released_tree(config)
    torch.save(tree, tmp_path / "w.pth.tar")
    train(config, tmp_path / "run", released=str(tmp_path / "w.pth.tar"))
    state = state_of(tmp_path / "run")
    assert state["position"]["total_steps"] == 4 and state["position"]["phase"] == "training"
    # Of a restart the folder has a checkpoint, and the released file, which may be gone, isn't read.
    (tmp_path / "w.pth.tar").unlink()
    whole = config_of("caco", images, "optimizer.name=lars")
    summary = train(whole, tmp_path / "run", "auto", released=str(tmp_path / "w.pth.tar"))
    assert summary["finished"] and summary["steps"] == 9 and summary["imported_steps"] == 3
    # The imported steps took no time here.
    measured = 6 * 8 / state_of(tmp_path / "run")["position"]["phase_seconds"]
    assert summary["pairs_per_second"] == pytest.approx(measured, abs=0.06)


def state_of(run: Path) -> dict[str, Any]:
    return load_state(CheckpointStore(run / "checkpoints").latest())


def imported_bank(config: Config, file: str, folder: str) -> list[Tensor]:
    trainer = build(config, Path(folder))
    _import(config, trainer, file, False)
    bank = trainer.method.bank
    return [bank.bank, bank.velocity]


def test_every_rank_gets_its_rows(images: Path, tmp_path: Path) -> None:
    config = config_of("caco", images)
    tree = released_tree(config)
    torch.save(tree, tmp_path / "w.pth.tar")
    parts = run_ranks(imported_bank, 2, config, str(tmp_path / "w.pth.tar"), str(tmp_path / "run"))
    for number, name in enumerate("Wv"):
        assert torch.equal(torch.cat([part[number] for part in parts]), tree["Memory_Bank"][name].T)
        assert len(parts[0][number]) == 18


def without(name: str) -> Any:
    def change(tree: dict[str, Any]) -> None:
        del tree["state_dict"][name]

    return change


def added(tree: dict[str, Any]) -> None:
    tree["state_dict"]["module.encoder_q.fc.9.weight"] = torch.zeros(2)


def reshaped(tree: dict[str, Any]) -> None:
    tree["state_dict"]["module.encoder_k.fc.0.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "change, settings, suffix, line",
    [
        (lambda tree: tree.pop("Memory_Bank"), [], "", "found the keys epoch, .*expected state_dict and Memory_Bank"),
        (lambda tree: tree["Memory_Bank"].pop("v"), [], "", r"found the bank \{'W': \[16, 37\]\}, expected W and v"),
        (
            without("module.encoder_k.bn1.weight"),
            [],
            "",
            "1 are missing, such as key.backbone.bn1.weight; set backbone",
        ),
        (added, [], "", "1 have no place here, such as query.projector.9.weight"),
        (
            reshaped,
            [],
            "",
            r"1 differ in shape, such as key.projector.0.weight \(found \[2, 2\], expected \[16, 16\]\)",
        ),
        (lambda tree: None, ["caco.bank_size=38"], "", "^caco.bank_size: found 38, expected 37, the rows of the bank"),
        (lambda tree: None, ["method=moco"], "", "found a checkpoint of caco, but method=moco"),
        (
            lambda tree: tree.update(epoch=3),
            [],
            "",
            "3 epochs, but trainer.epochs=3; set that above 3, or begin the sch",
        ),
        (lambda tree: tree.pop("epoch"), [], "", "found the epoch None, expected a whole number"),
        (lambda tree: None, [], "@key", "found @key, expected nothing or @epoch=N"),
    ],
)
def test_what_does_not_fit_is_one_line(
    images: Path, tmp_path: Path, change: Any, settings: list[str], suffix: str, line: str
) -> None:
    config = config_of("caco", images)
    tree = released_tree(config)
    change(tree)
    torch.save(tree, tmp_path / "w.pth.tar")
    other = config_of("caco", images, *settings)
    trainer = build(other, tmp_path / "run")
    with pytest.raises(UserError, match=line) as error:
        _import(other, trainer, f"{tmp_path / 'w.pth.tar'}{suffix}", False)
    assert "\n" not in str(error.value)


def test_the_schedule_may_begin_anew(images: Path, tmp_path: Path) -> None:
    config = config_of("caco", images)
    torch.save(released_tree(config, epoch=200), tmp_path / "w.pth.tar")
    trainer = build(config, tmp_path / "run")
    _import(config, trainer, f"{tmp_path / 'w.pth.tar'}@epoch=0", False)
    assert (trainer.position.step, trainer.position.epochs_ended, trainer.position.phase) == (0, 0, "training")
