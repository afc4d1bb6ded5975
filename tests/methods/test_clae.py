"""CLAE over each base against its formula in f64, and what its attack may and may not touch.

Legend: B images, P pixels of an image, K bank or queue rows, C channels.
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.errors import UserError
from caco_fast.methods import AdCoConfig, CaCoConfig, Embeddings, Method, MoCoConfig, build_method, clae
from caco_fast.methods.base import METHODS
from caco_fast.methods.clae import CLAE, CLAEConfig
from caco_fast.methods.simclr import InfoNCEConfig, SimCLRConfig
from tests import oracle
from tests.methods.stand_ins import small_pair

B, P, K, C, EPS = 5, 7, 9, 4, 0.03
SECTIONS = {
    "simclr": SimCLRConfig(temperature=0.4),
    "infonce": InfoNCEConfig(temperature=0.3),
    "moco": MoCoConfig(queue_size=K, temperature=0.2),
    "moco symmetric": MoCoConfig(queue_size=K, temperature=0.3, symmetric=True),
    "caco": CaCoConfig(bank_size=K, temperature=0.12, bank_temperature=0.07, bank_lr=0.1),
    "adco": AdCoConfig(bank_size=K, temperature=0.14, bank_temperature=0.07, bank_lr=0.1),
    "adco symmetric": AdCoConfig(bank_size=K, temperature=0.14, bank_temperature=0.07, bank_lr=0.1, symmetric=True),
}
bases = pytest.mark.parametrize("base", SECTIONS)


def make(base: str, dtype: torch.dtype = torch.float32, **settings: Any) -> CLAE:
    name = base.split()[0]
    method = build_method("clae", C, {"clae": CLAEConfig(base=name, **settings), name: SECTIONS[base]}).to(dtype)
    assert isinstance(method, CLAE)
    if name == "caco":
        method.base.criterion.operands = dtype  # type: ignore[union-attr]
    if name == "adco":
        method.base.operands = dtype  # type: ignore[assignment]
    if name == "moco":
        # Unit rows in f64 too.
        method.base.queue.queue.copy_(normalize(method.base.queue.queue, dim=1))  # type: ignore[union-attr]
    return method


class TwoSets:
    """Encoders in f64: a linear layer and a BatchNorm with a scale for each set. Keys are of another layer."""

    query = SimpleNamespace(autocast=None)

    def __init__(self) -> None:
        self.weight, self.scale = (
            torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((P, C), (2, C))
        )
        self.of_keys = torch.randn(P, C, dtype=torch.float64)

    def forward(self, view: Tensor, norm_set: int, weight: Tensor, scale: Tensor) -> Tensor:
        hidden = view @ weight
        return normalize((hidden - hidden.mean(dim=0)) / hidden.std(dim=0) * scale[norm_set], dim=1)

    def queries(self, views: list[Tensor], norm_sets: tuple[int, ...] = ()) -> list[Tensor]:
        sets = norm_sets or [0] * len(views)
        return [self.forward(view, norm_set, self.weight, self.scale) for view, norm_set in zip(views, sets)]

    def embed(self, views: list[Tensor], norm_sets: tuple[int, ...] = ()) -> list[Tensor]:
        constant = self.weight.detach(), self.scale.detach()
        return [self.forward(view, norm_set, *constant) for view, norm_set in zip(views, norm_sets)]

    def keys(self, views: list[Tensor]) -> list[Tensor]:
        return [normalize(view.detach() @ self.of_keys, dim=1) for view in views]


def share(query: Tensor, own: Tensor, others: list[Tensor], t: float) -> Tensor:
    """- log of the share of the row `own`, all rows constant or not as they come."""
    scores = torch.stack([(query * row).sum() / t for row in [own, *others]])
    return -(scores[0] - scores.exp().sum().log())


def attacked(base: str, method: CLAE, anchor: Tensor, other: Tensor, k_b: Tensor) -> Tensor:
    """L of the anchor (or k_b) and the changed image, image by image."""
    t, found = SECTIONS[base].temperature, []
    for i in range(B):
        if base == "simclr":
            rest = [row for n in range(B) if n != i for row in (anchor[n], other[n])]
            found += [share(anchor[i], other[i], rest, t), share(other[i], anchor[i], rest, t)]
        elif base == "infonce":
            found.append(share(anchor[i], other[i], [other[n] for n in range(B) if n != i], t))
        elif base.startswith("moco"):
            found.append(share(other[i], k_b[i], list(method.base.queue.queue.clone()), t))
        elif base.startswith("adco"):
            others = [row for n, row in enumerate(k_b) if n != i]
            found.append(share(other[i], k_b[i], [*others, *oracle.unit_rows(method.base.bank.bank)[0]], t))
        else:
            units = oracle.unit_rows(method.base.bank.bank)[0]
            (own,) = oracle.select(k_b[i : i + 1], method.base.bank.bank)
            found.append(share(other[i], units[own], [row for j, row in enumerate(units) if j != own], t))
    return torch.stack(found).mean()


@bases
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_three_steps_are_the_formula(base: str, alpha: float) -> None:
    method, encoders = make(base, torch.float64, alpha=alpha, eps=EPS), TwoSets()
    alone: Method = copy.deepcopy(method.base)
    pixels = torch.zeros(2)
    for _ in range(3):
        views = [torch.randn(B, P, dtype=torch.float64) for _ in range(2)]
        (k_b,) = encoders.keys(views[1:])
        x = views[0].clone().requires_grad_()
        anchor = encoders.forward(views[0], 1, encoders.weight, encoders.scale).detach()
        moved = encoders.forward(x, 1, encoders.weight, encoders.scale)
        (gradient,) = torch.autograd.grad(attacked(base, method, anchor, moved, k_b), x)
        x_adv = views[0] + EPS * torch.sign(gradient)
        found = method.attack(views[0], method.base.embed(views, encoders), encoders)  # type: ignore[arg-type]
        pixels += torch.tensor([(found != x_adv).sum(), x_adv.numel()])
        assert not found.requires_grad

        of_base = alone(views, encoders)
        clean = encoders.forward(views[0], 0, encoders.weight, encoders.scale)
        other = encoders.forward(x_adv, 1, encoders.weight, encoders.scale)
        wanted = of_base.loss + alpha * attacked(base, method, clean, other, k_b)
        output = method(views, encoders)
        torch.testing.assert_close(output.loss, wanted, rtol=0, atol=1e-10)
        parameters = [encoders.weight, encoders.scale]
        for ours, theirs in zip(torch.autograd.grad(output.loss, parameters), torch.autograd.grad(wanted, parameters)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        # The bank or queue steps from the clean embeddings alone.
        method.update(output.rows, 0.5)
        alone.update(of_base.rows, 0.5)
        for name, value in alone.state_dict().items():
            assert torch.equal(method.base.state_dict()[name], value), name
        with torch.no_grad():
            for value in parameters:
                value += 0.1 * torch.randn_like(value)
    # The sign of a gradient of some 1e-17 is that of its rounding.
    assert pixels[0] <= 0.01 * pixels[1]


def clean_state(pair: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items() if ".further." not in name}


@pytest.mark.parametrize("base", ["simclr", "caco"])
def test_the_attack_touches_no_parameter_and_no_clean_batch_norm(base: str) -> None:
    method, pair = make(base), small_pair(C, norm_sets=2)
    views = [torch.randn(B, 3, 2, 2) for _ in range(2)]
    clean = method.base.embed(views, pair)
    before, trained = clean_state(pair), [value.requires_grad for value in pair.parameters()]
    method.attack(views[0], clean, pair)
    for name, value in clean_state(pair).items():
        assert torch.equal(value, before[name]), name
    assert all(value.grad is None for value in pair.parameters())
    assert [value.requires_grad for value in pair.parameters()] == trained
    # One forward of the second set.
    norm = pair.query.projector[1]
    assert [int(norm.num_batches_tracked), int(norm.further[0].num_batches_tracked)] == [2, 1]


def test_adversarial_examples_train_their_own_batch_norms_and_all_other_layers() -> None:
    """Over MoCo, whose adversarial term has no clean query."""
    gradients = []
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        method, pair = make("moco", alpha=alpha), small_pair(C, norm_sets=2)
        views = [torch.randn(B, 3, 2, 2) for _ in range(2)]
        method(views, pair).loss.backward()
        gradients.append({name: value.grad for name, value in pair.query.named_parameters()})
    same = [name for name in gradients[0] if torch.equal(gradients[0][name], gradients[1][name])]
    assert same == ["projector.1.weight", "projector.1.bias"]
    assert not any(gradients[0][f"projector.1.further.0.{name}"].any() for name in ("weight", "bias"))


def test_under_fp16_small_gradients_keep_their_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    images = 64
    pair, method = small_pair(C, norm_sets=2, key_encoder=False), make("simclr")
    with torch.no_grad():
        pair.query.backbone[1].weight *= 0.01
        pair.query.projector[1].further[0].eps = 1.0
    views = [torch.randn(images, 3, 2, 2) for _ in range(2)]
    embeddings = method.embed(views, pair)

    def signs(autocast: torch.dtype | None) -> Tensor:
        pair.query.autocast = autocast
        return (method.attack(views[0], embeddings, pair) - views[0]).sign()

    exact, scaled = signs(None), signs(torch.float16)
    assert exact.all() and (scaled != exact).float().mean() < 0.05
    monkeypatch.setattr(clae, "FP16_SCALE", 1 / images)
    assert (signs(torch.float16) == 0).float().mean() > 0.5, "without the factor"


def test_a_gradient_that_is_not_a_number_leaves_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    method, pair = make("simclr"), small_pair(C, norm_sets=2)
    views = [torch.randn(B, 3, 2, 2) for _ in range(2)]
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0]).view(B, 1, 1, 1).expand(B, 3, 2, 2)
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: (bad,))
    moved = method.attack(views[0], method.embed(views, pair), pair) - views[0]
    wanted = EPS * torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(moved, wanted.view(B, 1, 1, 1).expand(B, 3, 2, 2), rtol=0, atol=1e-6)


def test_held_out_images_are_measured_without_a_gradient() -> None:
    method, pair = make("caco").eval(), small_pair(C, norm_sets=2).eval()
    views = [torch.randn(B, 3, 2, 2) for _ in range(2)]
    with torch.no_grad():
        output = method.loss(method.embed(views, pair), record=False)
    assert output.loss.isfinite() and not output.loss.requires_grad


@bases
def test_a_wrapper_passes_on_what_its_base_says(base: str) -> None:
    method, name = make(base), base.split()[0]
    sections = {"clae": method.config, name: SECTIONS[base]}
    needs, of_base = CLAE.needs(method.config, sections), METHODS[name].method.needs(SECTIONS[base], sections)
    assert (needs.key_encoder, needs.norm_sets) == (of_base.key_encoder, 2)
    inner = method.base
    assert (method.accumulates, method.shown) == (inner.accumulates, inner.shown)
    assert method.losses() == inner.losses() and method.rates(0.5) == inner.rates(0.5)
    assert list(method.bank_uses(3, 2)) == list(inner.bank_uses(3, 2))
    phases, of_inner = method.phases(4), inner.phases(4)
    assert [(phase.name, phase.steps, phase.capturable) for phase in phases] == [
        (phase.name, phase.steps, phase.capturable) for phase in of_inner
    ]
    assert phases[-1].objective is method
    assert all(phase.objective == other.objective for phase, other in zip(phases[:-1], of_inner[:-1]))
    with pytest.raises(UserError, match="views: found 1 "):
        method.check_views([32])


def test_metrics_are_those_of_the_clean_views_and_the_adversarial_loss() -> None:
    method, pair = make("caco"), small_pair(C, norm_sets=2)
    views = [torch.randn(B, 3, 2, 2) for _ in range(2)]
    embeddings = method.embed(views, pair)
    output = method.loss(embeddings, record=False)
    alone = method.base.loss(Embeddings(embeddings.queries[:2], embeddings.keys), record=False)
    assert output.metrics.keys() == {*alone.metrics, "adversarial_loss"}
    assert all(torch.equal(output.metrics[name], value) for name, value in alone.metrics.items())


@pytest.mark.parametrize("base", ["mocco", "nnclr", "clae"])
def test_a_base_that_does_not_exist_or_has_no_such_loss_is_one_line(base: str) -> None:
    with pytest.raises(UserError) as error:
        CLAEConfig(base=base)
    line = str(error.value)
    assert line.startswith(f"clae.base: found '{base}', expected one of ") and "\n" not in line
    offered = line.partition("expected one of ")[2].split(", ")
    assert {"simclr", "infonce", "moco", "caco"} <= set(offered) and not {"nnclr", "clae"} & set(offered)


@pytest.mark.parametrize("name", ["eps", "alpha"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"clae.{name}: found {value}, expected 0 or more"):
        CLAEConfig(**{name: value})
