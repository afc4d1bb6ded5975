"""CaCoLoss and the bank's step against the formulas, in f64, over several steps.

Legend: B images, K bank rows, C channels.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank
from caco_fast.errors import UserError
from caco_fast.methods import CaCoLoss
from tests import oracle

B, K, C = 5, 13, 6
EXACT = dict(rtol=0, atol=1e-12)


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def make(norm: str = "implicit", t: float = 0.1, t_m: float = 0.1, **settings: object) -> CaCoLoss:
    """A criterion in f64 over a bank whose rows have lengths between 0.5 and 2."""
    bank = LearnableBank(K, C, norm=norm, **settings).double()
    bank.bank.mul_(0.5 + 1.5 * torch.rand(K, 1, dtype=torch.float64))
    return CaCoLoss(bank, t, t_m, operands=torch.float64)


def views(count: int) -> list[Tensor]:
    return [unit(B, C).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("small", [0, 1, 6], ids=["2 views", "2+1 views", "2+6 views"])
@pytest.mark.parametrize("t, t_m", [(0.1, 0.1), (0.12, 0.05)], ids=["t equals t_m", "t differs from t_m"])
@pytest.mark.parametrize("norm", ["implicit", "project"])
def test_loss_gradients_and_bank_over_consecutive_steps(norm: str, t: float, t_m: float, small: int) -> None:
    criterion = make(norm, t, t_m)
    bank, velocity = criterion.bank.bank.clone(), torch.zeros(K, C, dtype=torch.float64)
    for _ in range(4):
        queries, keys = views(2 + small), [unit(B, C), unit(B, C)]
        found = criterion(*queries[:2], *keys, queries[2:])
        found_grads = torch.autograd.grad(found, queries)
        wanted = oracle.caco_loss(queries, keys, bank, t)
        torch.testing.assert_close(found, wanted, **EXACT)
        for a, b in zip(found_grads, torch.autograd.grad(wanted, queries)):
            torch.testing.assert_close(a, b, **EXACT)
        criterion.bank.step(lr=0.3)
        gradient = oracle.caco_gradient(queries, keys, bank, t_m)
        bank, velocity = oracle.step(bank, velocity, gradient, 0.3, 0.9, norm == "project")
        torch.testing.assert_close(criterion.bank.bank, bank, **EXACT)
        torch.testing.assert_close(criterion.bank.velocity, velocity, **EXACT)
    if norm == "project":
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(K, dtype=torch.float64), **EXACT)


def test_query_gradient_is_the_formula() -> None:
    """dL/dq_i = ( sum_j p_ij u_j - u_pi ) / (t B)"""
    criterion = make(t=0.2)
    (q_a, q_b), k_a, k_b = views(2), unit(B, C), unit(B, C)
    criterion(q_a, q_b, k_a, k_b).backward()
    u = oracle.unit_rows(criterion.bank.bank)[0]
    for q, k in ((q_a, k_b), (q_b, k_a)):
        p = torch.softmax(q.detach() @ u.T / 0.2, dim=1)
        torch.testing.assert_close(q.grad, (p @ u - u[oracle.select(k, u)]) / (0.2 * B), **EXACT)


def test_the_positive_of_a_query_comes_from_the_other_view() -> None:
    bank = LearnableBank(4, 4)
    bank.bank.copy_(torch.eye(4))
    criterion = CaCoLoss(bank, 0.1, 0.1)
    first, second = torch.eye(4)[:1], torch.eye(4)[1:2]
    swapped = criterion(q_a=second, q_b=first, k_a=first, k_b=second)
    same = criterion(q_a=first, q_b=second, k_a=first, k_b=second)
    assert swapped.item() < 0.01 < 19 < same.item()


def test_two_views_are_summed_and_crops_averaged() -> None:
    criterion = make()
    q, k = unit(B, C), unit(B, C)
    single = criterion(q, q, k, k)
    with_crops = criterion(q, q, k, k, [q, q, q])
    # All pairs are equal here: 1 + 1 for two views; with crops, a mean of 1 for the large and one for the small pairs.
    torch.testing.assert_close(single, with_crops, **EXACT)
    half = oracle.caco_loss([q, q], [k, k], criterion.bank.bank, 0.1) / 2
    torch.testing.assert_close(single, 2 * half, **EXACT)


def test_metrics_are_those_of_the_chosen_rows() -> None:
    criterion = make(t=0.15)
    (q_a, q_b), k_a, k_b = views(2), unit(B, C), unit(B, C)
    criterion(q_a, q_b, k_a, k_b)
    u = oracle.unit_rows(criterion.bank.bank)[0]
    chosen = oracle.select(k_b, u) + oracle.select(k_a, u)
    p = torch.softmax(torch.cat([q_a, q_b]).detach() @ u.T / 0.15, dim=1)
    wanted = sum(p[i, j].item() for i, j in enumerate(chosen)) / (2 * B)
    assert criterion.positive_probability.item() == pytest.approx(wanted, abs=1e-12)
    assert not criterion.positive_probability.requires_grad
    shares = torch.tensor([chosen.count(j) / (2 * B) for j in set(chosen)])
    assert criterion.positive_perplexity.item() == pytest.approx(2 ** -(shares * shares.log2()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_perplexity_counts_rows_used_equally(rows: int) -> None:
    bank = LearnableBank(8, 8)
    bank.bank.copy_(torch.eye(8))
    criterion = CaCoLoss(bank)
    keys = torch.eye(8)[torch.arange(8) % rows]
    criterion(keys, keys, keys, keys)
    assert criterion.positive_perplexity.item() == pytest.approx(rows, rel=1e-6)


def test_keys_and_bank_are_constants_of_the_loss() -> None:
    criterion = make()
    keys = [unit(B, C).requires_grad_(), unit(B, C).requires_grad_()]
    criterion(*views(2), *keys).backward()
    assert keys[0].grad is None and keys[1].grad is None
    assert not criterion.bank.bank.requires_grad


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_nothing_is_recorded_outside_of_training(how: str) -> None:
    criterion = make()
    if how == "eval":
        criterion.eval()
    with torch.set_grad_enabled(how != "no_grad"):
        criterion(*views(2), unit(B, C), unit(B, C))
    with pytest.raises(UserError, match="no rows were recorded"):
        criterion.bank.step(0.1)


def test_a_step_consumes_what_was_recorded() -> None:
    criterion = make()
    criterion(*views(2), unit(B, C), unit(B, C))
    criterion.bank.step(0.1)
    with pytest.raises(UserError, match="no rows were recorded"):
        criterion.bank.step(0.1)


@pytest.mark.parametrize("small", [0, 2], ids=["2 views", "2+2 views"])
def test_gradient_accumulation_equals_the_whole_batch(small: int) -> None:
    whole, halves = make(t_m=0.07), make(t_m=0.07)
    halves.load_state_dict(whole.state_dict())
    queries, keys = [unit(2 * B, C).requires_grad_() for _ in range(2 + small)], [unit(2 * B, C), unit(2 * B, C)]
    loss = whole(*queries[:2], *keys, queries[2:])
    grads = torch.autograd.grad(loss, queries)
    whole.bank.step(0.3)

    sums = [torch.zeros_like(q) for q in queries]
    parts = []
    for part in (slice(0, B), slice(B, 2 * B)):
        q, k = [q[part] for q in queries], [key[part] for key in keys]
        parts.append(halves(*q[:2], *k, q[2:]) / 2)
        for total, grad in zip(sums, torch.autograd.grad(parts[-1], queries)):
            total += grad
    halves.bank.step(0.3, scale=0.5)
    torch.testing.assert_close(sum(parts), loss, **EXACT)
    for a, b in zip(sums, grads):
        torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(halves.bank.bank, whole.bank.bank, **EXACT)


def test_f32_on_the_tiled_backend_agrees_with_f64() -> None:
    exact = make(t_m=0.07)
    single = CaCoLoss(LearnableBank(K, C, backend="tiled"), 0.1, 0.07)
    single.bank.bank.copy_(exact.bank.bank)
    for _ in range(3):
        queries, keys = [unit(B, C) for _ in range(4)], [unit(B, C), unit(B, C)]
        wanted = exact(*queries[:2], *keys, queries[2:])
        found = single(*(q.float() for q in queries[:2]), *(k.float() for k in keys), [q.float() for q in queries[2:]])
        exact.bank.step(0.3)
        single.bank.step(0.3)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(single.bank.bank.double(), exact.bank.bank, rtol=0, atol=1e-5)


def test_autocast_around_the_loop_changes_nothing() -> None:
    criterion = CaCoLoss(LearnableBank(64, 16))
    q_a, q_b, k_a, k_b = (unit(8, 16, dtype=torch.float32) for _ in range(4))
    plain = criterion(q_a, q_b, k_a, k_b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(criterion(q_a, q_b, k_a, k_b), plain)


def test_bf16_operands_stay_close_and_the_loss_f32() -> None:
    bank = LearnableBank(64, 16)
    q_a, q_b, k_a, k_b = (unit(32, 16, dtype=torch.float32) for _ in range(4))
    q_a.requires_grad_()
    plain = CaCoLoss(bank)(q_a, q_b, k_a, k_b)
    (wanted,) = torch.autograd.grad(plain, q_a)
    bank.discard()
    low = CaCoLoss(bank, operands=torch.bfloat16)(q_a, q_b, k_a, k_b)
    (found,) = torch.autograd.grad(low, q_a)
    bank.step(1.0)
    assert low.dtype == found.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0.01, atol=0)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.999
    assert bank.bank.isfinite().all() and bank.skipped_rows == 0


def test_the_loop_of_the_readme_moves_encoder_and_bank_together() -> None:
    """loss = criterion(q_a, q_b, k_a, k_b); loss.backward(); optimizer.step(); bank.step(lr)"""
    encoder = torch.nn.Linear(8, 4)
    bank = LearnableBank(32, 4)
    criterion = CaCoLoss(bank)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    images = torch.randn(16, 8)
    weight = encoder.weight.detach().clone()
    closeness = []
    for _ in range(30):
        q_a, q_b = normalize(encoder(images), dim=1), normalize(encoder(images), dim=1)
        loss = criterion(q_a, q_b, q_a.detach(), q_b.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bank.step(lr=0.05)
        closeness.append(bank.select(q_a)[1].mean().item())
    assert not torch.equal(encoder.weight, weight)
    # Positives and negatives alike move towards the queries.
    assert closeness[-1] > closeness[0] + 0.02
    assert not bank.pending.records


def test_state_dict_holds_bank_and_velocity() -> None:
    criterion = make()
    assert set(criterion.state_dict()) == {"bank.bank", "bank.velocity"}
    criterion(*views(2), unit(B, C), unit(B, C))
    criterion.bank.step(0.1)
    other = make()
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.bank.velocity, criterion.bank.velocity) and other.bank.velocity.abs().sum() > 0


def test_rows_that_do_not_belong_together_are_named() -> None:
    criterion = make()
    with pytest.raises(ValueError, match=r"CaCoLoss: k_b: found shape \[3, 6\], expected \[5, 6\] as q_a"):
        criterion(unit(B, C), unit(B, C), unit(B, C), unit(3, C))
    with pytest.raises(ValueError, match=r"CaCoLoss: small\[1\]: found shape \[2, 6\]"):
        criterion(unit(B, C), unit(B, C), unit(B, C), unit(B, C), [unit(B, C), unit(2, C)])
