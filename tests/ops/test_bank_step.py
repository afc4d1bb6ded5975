"""bank_step_ on every backend. Legend: R query rows, K bank rows, C channels, M positives per row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from caco_fast.ops import bank_attend, bank_select, bank_step, bank_step_
from tests import oracle
from tests.ops.backends import EMULATED, KERNELS, PLAIN, Backend, over
from tests.ops.cases import ADVERSARIAL, KINDS, RAGGED, SHAPES, Case, inputs, make_for_precision, unit_rows
from tests.ops.tolerances import CLOSE, assert_twice_plain, bank_bound, share, velocity_bound

TEMPERATURE, LR, MOMENTUM = 0.1, 0.5, 0.9


class Step:
    """The arguments of a step on a case, and what the oracle makes of them."""

    weight_decay = 0.0
    temperature = TEMPERATURE

    def __init__(self, case: Case, many: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries, self.bank = case.make()
        self.velocity = 0.01 * torch.randn(self.bank.shape, generator=generator)
        self.row_weight = (torch.rand(case.rows, generator=generator) + 0.5) / case.rows
        self.positives = torch.randint(0, case.bank_rows, (case.rows, many), generator=generator)
        self.positive_weight = torch.rand(case.rows, many, generator=generator)
        lse, self.p, _ = oracle.attend(self.queries, oracle.unit_rows(self.bank)[0], TEMPERATURE)
        self.lse = lse.float()

    def run(self, backend: Backend, **changes: Any) -> tuple[Tensor, Tensor]:
        """The new bank and velocity; this step's stay as they are."""
        bank, velocity = self.bank.clone(), self.velocity.clone()
        settings = dict(temperature=self.temperature, lr=LR, momentum=MOMENTUM, row_weight=self.row_weight)
        settings |= dict(weight_decay=self.weight_decay)
        settings |= dict(positives=self.positives, positive_weight=self.positive_weight, backend=backend.name)
        bank_step_(bank, velocity, self.queries, self.lse, **settings | changes)
        return bank, velocity

    def expected(self, project: bool = False) -> tuple[Tensor, Tensor]:
        weights = self.row_weight, self.positives, self.positive_weight
        gradient = oracle.gradient(self.bank, self.queries, self.p, self.temperature, *weights)
        return oracle.step(self.bank, self.velocity, gradient, LR, MOMENTUM, project, self.weight_decay)

    def bound(self, backend: Backend) -> Tensor:
        operand = backend.operand(self.queries.dtype)
        settings = self.bank, self.queries, self.p, self.temperature, self.row_weight, self.expected()[1]
        return velocity_bound(operand, *settings)


class DecayingStep(Step):
    weight_decay = 0.02


class JointStep(Step):
    """A step of AdCo: the softmax has keys of the batch beside the bank, of which each query is near to one."""

    weight_decay = 0.02
    temperature = 0.02

    def __init__(self, case: Case) -> None:
        super().__init__(case, 0)
        unit = oracle.unit_rows(self.bank)[0]
        near = self.queries.double() + 0.2 * unit[torch.arange(case.rows) % case.bank_rows]
        keys = torch.nn.functional.normalize(near + 0.3 * near.roll(1, 0), dim=1)
        # Some rows of the bank are as near as the keys.
        unit[: case.rows : 2] = keys[: len(unit) : 2]
        self.bank = (unit * self.bank.double().norm(dim=1, keepdim=True)).float()
        columns = torch.cat([keys, oracle.unit_rows(self.bank)[0]])
        lse, p, _ = oracle.attend(self.queries, columns, self.temperature)
        self.lse, self.p = lse.float(), p[:, case.rows :]


def check(backend: Backend, case: Case, many: int = 1) -> None:
    check_step(backend, Step(case, many))


def check_step(backend: Backend, step: Step) -> None:
    (bank, velocity), (expected_bank, expected_velocity) = step.run(backend), step.expected()
    bound = step.bound(backend)
    assert share(velocity, expected_velocity, bound) <= 1
    assert share(bank, expected_bank, bank_bound(bound, LR, expected_bank)) <= 1


# In f64, against loops over floats and autograd


@over("auto", *PLAIN)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("many", [0, 1, 2], ids=["M0", "M1", "M2"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05], ids=["", "wd"])
def test_steps_follow_the_oracle(backend: Backend, shape, norm, many, weight_decay, small_tiles):
    """Five steps with new queries each, loss and bank temperature unequal, row weights unequal."""
    _, bank = inputs(*shape)
    _, rows, _, channels = shape
    bank /= bank.norm(dim=1, keepdim=True).clamp_max(1)  # Rows shorter than 1 would leap: g grows as 1 / |w|.
    velocity = torch.zeros_like(bank)
    expected_bank, expected_velocity = bank.clone(), velocity.clone()
    lr, momentum, temperature = 0.3, 0.9, 0.1
    for _ in range(5):
        queries, keys = unit_rows(rows, channels, torch.float64), unit_rows(rows, channels, torch.float64)
        row_weight = torch.rand(rows, dtype=torch.float64) / rows
        picked = [bank_select(keys if m == 0 else -keys, bank, backend.name)[0] for m in range(many)]
        positives = torch.stack(picked, dim=1) if many else torch.empty((rows, 0), dtype=torch.int64)
        weight = torch.softmax(torch.randn(rows, many, dtype=torch.float64), dim=1)

        lists = row_weight.tolist(), positives.tolist(), weight.tolist()
        gradient = oracle.gradient_by_loops(expected_bank, queries, temperature, *lists)
        p = oracle.attend(queries, oracle.unit_rows(expected_bank)[0], temperature)[1]
        by_autograd = oracle.gradient(expected_bank, queries, p, temperature, row_weight, positives, weight)
        torch.testing.assert_close(gradient, by_autograd, **CLOSE)
        if many == 0:
            of_loss = oracle.gradient_of_loss(expected_bank, queries, temperature, row_weight)
            torch.testing.assert_close(gradient, of_loss, **CLOSE)
        expected_bank, expected_velocity = oracle.step(
            expected_bank, expected_velocity, gradient, lr, momentum, norm == "project", weight_decay
        )

        (_, lse), _ = bank_attend(queries, bank, (0.08, temperature), backend.name)
        bank_step_(
            bank, velocity, queries, lse, temperature=temperature, lr=lr, momentum=momentum, row_weight=row_weight,
            positives=positives if many else None, positive_weight=weight if many else None, norm=norm,
            weight_decay=weight_decay, backend=backend.name,
        )  # fmt: skip
        torch.testing.assert_close(velocity, expected_velocity, **CLOSE)
        torch.testing.assert_close(bank, expected_bank, **CLOSE)


@over("auto", *PLAIN)
def test_a_bank_of_very_unequal_lengths(backend: Backend, small_tiles):
    """g is exact relative to its own size, which is 1 / |w|, for lengths from 1e-3 to 1e3."""
    queries = unit_rows(6, 5, torch.float64)
    lengths = torch.logspace(-3, 3, 11, dtype=torch.float64).unsqueeze(1)
    bank = unit_rows(11, 5, torch.float64) * lengths
    velocity = torch.zeros_like(bank)
    positives = bank_select(queries, bank, backend.name)[0].unsqueeze(1)
    weights = torch.full((6,), 1 / 3, dtype=torch.float64)
    expected = oracle.gradient_by_loops(bank, queries, 0.08, weights.tolist(), positives.tolist(), [[1.0]] * 6)
    lse, _ = bank_attend(queries, bank, 0.08, backend.name)
    settings = {"temperature": 0.08, "lr": 0.0, "momentum": 0.9, "row_weight": weights, "positives": positives}
    bank_step_(bank, velocity, queries, lse, **settings, backend=backend.name)
    torch.testing.assert_close(velocity * lengths, expected * lengths, **CLOSE)


@over("auto", *PLAIN)
def test_a_positive_of_several_queries_takes_all_of_them(backend: Backend, small_tiles):
    queries, bank = inputs("random", 7, 9, 4)
    positives = torch.full((7, 2), 4)
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    halves = [[0.5, 0.5]] * 7
    expected = oracle.gradient_by_loops(bank, queries, 0.1, weights.tolist(), positives.tolist(), halves)
    velocity = torch.zeros_like(bank)
    lse, _ = bank_attend(queries, bank, 0.1, backend.name)
    settings = {"temperature": 0.1, "lr": 0.0, "momentum": 0.5, "row_weight": weights, "positives": positives}
    bank_step_(bank, velocity, queries, lse, **settings, backend=backend.name)  # positive_weight defaults to 1 / M
    torch.testing.assert_close(velocity, expected, **CLOSE)


# The kernels, element by element


@over(*KERNELS)
@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_kernels_follow_the_formula(backend: Backend, case):
    check(backend, case)
    assert backend.take("bank_conflicts") == 0


@over(*KERNELS)
@pytest.mark.parametrize("channels", range(64, 513, 16))
def test_every_sixteenth_channel_count_is_served(backend: Backend, channels):
    # Drawn so that no unit row lies midway between two fp16 numbers: there the order of its norm's sum would decide.
    check(backend, Case(7, 34, channels))


@over(*KERNELS)
@pytest.mark.parametrize("schedule", [dict(), dict(seed=5, greedy=True, lazy_copies=False)], ids=["late", "early"])
@pytest.mark.parametrize("case", [Case(700, 20, 64), Case(500, 140, 256), Case(300, 70, 512)], ids=str)
def test_kernels_with_queries_that_go_round_the_ring(backend: Backend, case, schedule):
    """More tiles of queries than a ring has stages, so that each stage is filled again."""
    backend.set_schedule(**schedule)
    check(backend, case)


@over(*KERNELS)
@pytest.mark.parametrize("many", [0, 1, 2, 8])
def test_kernels_with_m_positives(backend: Backend, many):
    check(backend, Case(50, 140, 64, torch.bfloat16), many)


DECAYING = [Case(1, 1, 64), Case(65, 131, 128, torch.float16), Case(130, 161, 256, torch.bfloat16), Case(67, 35, 512)]
DECAYING += [Case(70, 190, 80, kind=kind) for kind in ("norms", "zero_rows")]


@over(*KERNELS)
@pytest.mark.parametrize("case", DECAYING, ids=str)
@pytest.mark.parametrize("many", [0, 1, 2])
def test_kernels_with_weight_decay(backend: Backend, case, many):
    check_step(backend, DecayingStep(case, many))


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("case", [Case(40, 150, 64), Case(130, 70, 128, torch.bfloat16), Case(9, 300, 256)], ids=str)
def test_a_log_sum_exp_of_more_columns_than_the_bank(backend: Backend, case):
    step = JointStep(case)
    alone = oracle.attend(step.queries, oracle.unit_rows(step.bank)[0], step.temperature)[0]
    assert (step.lse > alone + 0.1).any() and step.p.amax() > 0.1
    check_step(backend, step)


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("many", [0, 2])
def test_rows_without_a_direction_only_decay(backend: Backend, norm, many):
    """Rows of zeros, and rows so short that the square of their length is 0 in f32; whatever their velocity is."""
    step = DecayingStep(Case(20, 150, 64), many)
    step.bank[::2] = 0
    step.bank[3::2] *= 1e-30
    step.velocity[4::4] = 0
    step.positives[:10] = 3
    bank, velocity = step.run(backend, norm=norm)
    assert bank.isfinite().all() and velocity.isfinite().all()
    wanted = MOMENTUM * step.velocity + step.weight_decay * step.bank
    rows = torch.arange(150) != 1
    torch.testing.assert_close(velocity[rows], wanted[rows], rtol=1e-6, atol=0)
    assert not bank[4::4].any()


@over(*PLAIN, *KERNELS)
def test_the_bound_finds_weight_decay_that_is_too_small(backend: Backend):
    step = DecayingStep(Case(20, 150, 64), 1)
    assert (
        share(step.run(backend, weight_decay=0.9 * step.weight_decay)[1], step.expected()[1], step.bound(backend)) > 1
    )


@over(*KERNELS)
@pytest.mark.parametrize("channels", [64, 200, 512])
def test_kernels_with_norm_project_give_unit_rows(backend: Backend, channels):
    step = DecayingStep(Case(20, 150, channels, torch.float16), 1)
    (bank, velocity), (expected, expected_velocity) = step.run(backend, norm="project"), step.expected(project=True)
    bound = step.bound(backend)
    assert share(velocity, expected_velocity, bound) <= 1
    torch.testing.assert_close(bank.double().norm(dim=1), torch.ones(150, dtype=torch.float64), rtol=0, atol=3e-7)
    torch.testing.assert_close(bank.double(), expected, rtol=0, atol=(2 * LR * bound).amax().item())


@over(*PLAIN, *KERNELS)
def test_all_rows_choose_the_same_bank_row(backend: Backend):
    step = Step(Case(150, 70, 64, torch.bfloat16), 2)
    step.positives.fill_(69)
    torch.testing.assert_close(step.run(backend)[1][69].double(), step.expected()[1][69], rtol=1e-3, atol=1e-4)


@over(*KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", [(450, 150, 64), (300, 140, 256), (210, 70, 512)], ids=str)
def test_a_row_that_all_queries_chose(backend: Backend, case, dtype):
    """More positives than a block lists at once, in both halves of its rows, some of rows beside them."""
    step = Step(Case(*case, dtype), 1)
    step.positives[:] = 9
    step.positives[1::7] = 3
    step.positives[5::50] = case[1] - 1
    (_, found), expected = step.run(backend), step.expected()[1]
    assert share(found, expected, step.bound(backend)) <= 1
    for schedule in (dict(seed=1), dict(seed=7, greedy=True, lazy_copies=False)):
        backend.set_schedule(**schedule)
        assert torch.equal(step.run(backend)[1], found)


@over(*EMULATED)
def test_positives_outside_of_the_bank_are_ignored(backend: Backend, monkeypatch):
    """The host does not read them on a GPU. The last block has rows beyond the bank."""
    monkeypatch.setattr(bank_step, "check_positive_range", lambda positives, bank_rows: None)
    step = Step(Case(40, 150, 64), 2)
    step.positives[::3, 0], step.positives[1::3, 1] = -1, 150
    found = step.run(backend)
    outside = (step.positives < 0) | (step.positives >= 150)
    step.positives[outside], step.positive_weight[outside] = 0, 0
    for value, expected in zip(found, step.run(backend)):
        torch.testing.assert_close(value, expected)


@over(*KERNELS)
@pytest.mark.parametrize("channels", [1, 5, 66, 130, 257, 500])
def test_rows_that_begin_anywhere(backend: Backend, channels):
    check(backend, Case(20, 140, channels), many=2)


@over(*KERNELS)
def test_a_bank_that_begins_anywhere(backend: Backend):
    """Contiguous, but not at a multiple of 16 bytes."""
    step = Step(Case(20, 140, 64, torch.bfloat16), 1)
    expected = step.run(backend)

    def one_further(value: Tensor) -> Tensor:
        memory = value.new_zeros(value.numel() + 1)[1:].view(value.shape)
        return memory.copy_(value)

    step.queries = one_further(step.queries)
    bank, velocity = one_further(step.bank), one_further(step.velocity)
    bank_step_(
        bank, velocity, step.queries, step.lse, temperature=TEMPERATURE, lr=LR, momentum=MOMENTUM,
        row_weight=step.row_weight, positives=step.positives, positive_weight=step.positive_weight,
        backend=backend.name,
    )  # fmt: skip
    assert torch.equal(bank, expected[0]) and torch.equal(velocity, expected[1])


@over(*EMULATED)
@pytest.mark.parametrize("dtype, launches", [(torch.float32, 3), (torch.float16, 2)], ids=["f32", "fp16"])
def test_a_step_is_three_launches_or_two(backend: Backend, dtype, launches):
    """Row terms and step, and the operand of queries that are not in its dtype; no sort."""
    step = Step(Case(20, 150, 64, dtype), 1)
    backend.take("launches")
    step.run(backend)
    assert backend.take("launches") == launches


@over("sm90")
@pytest.mark.parametrize("rows, bank_rows, prefetches", [(20, 128, 1), (20, 150, 2), (300, 150, 6), (20, 640, 7)])
def test_velocity_and_the_next_blocks_rows_are_prefetched(backend: Backend, rows, bank_rows, prefetches):
    """A piece a tile for each block's velocity, and for the bank rows of the block three further, if there is one."""
    step = Step(Case(rows, bank_rows, 64), 1)
    backend.take("prefetches")
    step.run(backend)
    assert backend.take("prefetches") == prefetches


@over(*PLAIN, *KERNELS)
def test_a_positive_moves_towards_its_query(backend: Backend):
    """With p = 0 the positive's own pull is 1, and w' = u + (q - s u), all in f32."""
    queries, bank = Case(1, 1, 64).make()
    velocity = torch.zeros_like(bank)
    s = (queries @ bank.T).item()
    bank_step_(
        bank, velocity, queries, torch.full((1,), 1e4), temperature=1.0, lr=1.0, momentum=0.0, row_weight=torch.ones(1),
        positives=torch.zeros(1, 1, dtype=torch.int64), positive_weight=torch.ones(1, 1), backend=backend.name,
    )  # fmt: skip
    after = torch.nn.functional.cosine_similarity(queries, bank).item()
    assert after == pytest.approx((s + 1 - s * s) / (2 - s * s) ** 0.5, abs=1e-6)


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("weights", ["zero", "some_zero", "huge", "negative"])
def test_unusual_row_weights(backend: Backend, weights):
    step = Step(Case(40, 90, 64, torch.float16), 1)
    step.row_weight = {
        "zero": torch.zeros(40),
        "some_zero": step.row_weight * (torch.arange(40) % 3 == 0),
        "huge": step.row_weight * 1e6,
        "negative": -step.row_weight,
    }[weights]
    (_, found), (_, expected) = step.run(backend), step.expected()
    scale = max((expected - MOMENTUM * step.velocity).abs().amax().item(), 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-3 * scale)


# The tiled form, against plain torch in the same precision


def plain_step(
    bank: Tensor, velocity: Tensor, queries: Tensor, lse: Tensor, positive: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Dense, similarities, coefficients and their product in the queries' precision. New bank and velocity."""
    dtype = queries.dtype
    norm = bank.norm(dim=1, keepdim=True)
    unit = bank / norm
    similarity = queries @ unit.to(dtype).T
    p = torch.exp(similarity / temperature - lse.to(dtype).unsqueeze(1))
    rows = torch.arange(len(queries))
    p[rows, positive] = 1 - p[rows, positive]
    along = (p * similarity).sum(dim=0).float().unsqueeze(1)
    tangent = weight * ((p.T @ queries).float() - along * unit)
    velocity = 0.9 * velocity - tangent / (norm * temperature)
    return bank - 0.5 * velocity, velocity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiled_errs_at_most_twice_as_much_as_plain_torch(dtype, kind):
    queries, bank = make_for_precision(kind, dtype)
    bank /= bank.norm(dim=1, keepdim=True).clamp_max(1)
    rows, weight = len(queries), 2 / len(queries)
    velocity = 0.01 * torch.randn_like(bank)
    exact_lse, _ = bank_attend(queries.double(), bank.double(), TEMPERATURE, "reference")
    positive, _ = bank_select(queries.double(), bank.double(), "reference")
    plain = plain_step(bank, velocity, queries, exact_lse.float(), positive, weight, TEMPERATURE)
    settings = dict(temperature=TEMPERATURE, lr=0.5, momentum=0.9, row_weight=torch.full((rows,), weight))
    settings |= dict(positives=positive.unsqueeze(1))
    found = bank.clone(), velocity.clone()
    bank_step_(*found, queries, exact_lse, **settings, backend="tiled")
    exact = bank.double(), velocity.double()
    bank_step_(*exact, queries.double(), exact_lse, **settings, backend="reference")
    for name, *values in zip(("bank", "velocity"), found, plain, exact):
        assert_twice_plain(*values, dtype, name)


# What every backend keeps


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("set_to", [0.0, 1.0])
def test_a_flag_that_is_set_skips_the_step(backend: Backend, set_to):
    step = Step(Case(20, 150, 64), 1)
    step.weight_decay = 0.02
    found = step.run(backend, norm="project", skip=torch.tensor(set_to))
    expected = (step.bank, step.velocity) if set_to else step.run(backend, norm="project")
    assert all(torch.equal(left, right) for left, right in zip(found, expected))


@over(*PLAIN, *KERNELS)
def test_an_lr_on_the_device_is_the_number(backend: Backend):
    step = Step(Case(3, 50, 64), 1)
    expected = step.run(backend)
    found = step.run(backend, lr=torch.tensor(LR, dtype=torch.float64))
    assert all(torch.equal(left, right) for left, right in zip(found, expected))
    still = step.run(backend, lr=torch.tensor(0.0))
    assert torch.equal(still[0], step.bank) and not torch.equal(expected[0], step.bank)


@over(*PLAIN, *EMULATED)
@pytest.mark.parametrize("set_to", [None, 0.0, 1.0])
@pytest.mark.parametrize("norm", ["implicit", "project"])
def test_the_operand_becomes_that_of_the_new_bank(backend: Backend, norm, set_to):
    """Also where a step is skipped; and bank and velocity get the same bits with an operand and without."""
    step = DecayingStep(Case(20, 150, 80, torch.float16), 1)
    skip = None if set_to is None else torch.tensor(set_to)
    operand = torch.full((150, 128), torch.nan, dtype=torch.float16)
    found = step.run(backend, norm=norm, skip=skip, operand=operand)
    expected = step.run(backend, norm=norm, skip=skip)
    assert all(torch.equal(left, right) for left, right in zip(found, expected))
    unit = oracle.unit_rows(found[0])[0]
    torch.testing.assert_close(operand[:, :80].double(), unit, rtol=2.0**-10, atol=1e-7)
    assert not operand[:, 80:].any()
    if backend.name == "cuda":
        attended = [bank_attend(step.queries, found[0], 0.1, "cuda", operand=copy) for copy in (operand, None)]
        assert torch.equal(attended[0][0], attended[1][0]) and torch.equal(attended[0][1], attended[1][1])


@over(*PLAIN, *KERNELS)
def test_without_rows_the_velocity_decays(backend: Backend):
    queries, bank = Case(3, 50, 64).make()
    found, velocity = bank.clone(), torch.ones_like(bank)
    settings = dict(temperature=0.1, lr=2.0, momentum=0.5, row_weight=torch.empty(0), backend=backend.name)
    bank_step_(found, velocity, queries[:0], torch.empty(0), **settings, positives=torch.empty(0, 1).long())
    assert torch.equal(velocity, torch.full_like(velocity, 0.5))
    torch.testing.assert_close(found, bank - 1)


@over(*PLAIN, *KERNELS)
def test_strided_input(backend: Backend):
    step = Step(Case(7, 30, 64), 1)
    expected = step.run(backend)
    step.queries = step.queries.repeat_interleave(2, dim=1)[:, ::2]
    step.row_weight = step.row_weight.repeat_interleave(2)[::2]
    step.bank, step.velocity = (value.T.contiguous().T for value in (step.bank, step.velocity))
    assert not step.bank.clone().is_contiguous() and not step.queries.is_contiguous()
    torch.testing.assert_close(step.run(backend), expected)


@over(*PLAIN, *KERNELS)
def test_a_zero_row_stays_at_rest(backend: Backend):
    step = Step(Case(5, 40, 64), 1)
    step.bank[3], step.velocity[3] = 0, 0
    step.positives[:] = 3
    bank, _ = step.run(backend)
    assert bank.isfinite().all()
    assert not bank[3].any()


@over("tiled", *KERNELS)
def test_two_runs_give_the_same_bits(backend: Backend):
    # Several tiles of the tiled form, and several blocks of the kernels.
    step = Step(Case(700, 3000, 64) if backend.name == "tiled" else Case(300, 600, 64), 2)
    step.positives[:] = 7
    assert all(torch.equal(left, right) for left, right in zip(step.run(backend), step.run(backend)))


BAD_STEPS = {
    "velocity shape": ({"velocity": torch.zeros(3, 4)}, ValueError, r"velocity: found shape \[3, 4\].*\[9, 4\]"),
    "velocity dtype": ({"velocity": torch.zeros(9, 4).double()}, TypeError, "velocity: found torch.float64"),
    "lse shape": ({"lse": torch.zeros(4)}, ValueError, r"lse: found shape \[4\], expected \[5\]"),
    "row_weight dtype": ({"row_weight": torch.ones(5).long()}, TypeError, "row_weight: found torch.int64"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: found 0.0"),
    "lr": ({"lr": float("nan")}, ValueError, "lr: found nan"),
    "lr of two": (
        {"lr": torch.ones(2)},
        ValueError,
        r"lr: found torch.float32 \[2\] on cpu, expected a number, or one",
    ),
    "negative lr": ({"lr": -1.0}, ValueError, "lr: found -1.0"),
    "momentum": ({"momentum": 1.0}, ValueError, r"momentum: found 1.0, expected a number in \[0, 1\)"),
    "weight decay": (
        {"weight_decay": -1.0},
        ValueError,
        "weight_decay: found -1.0, expected a finite number, 0 or more",
    ),
    "norm": ({"norm": "l2"}, ValueError, "norm: found 'l2', expected 'implicit' or 'project'"),
    "backend": ({"backend": "fast"}, ValueError, "backend: found 'fast', expected one of auto, reference, tiled, cuda"),
    "positives shape": ({"positives": torch.zeros(5).long()}, ValueError, r"positives: found shape \[5\]"),
    "positives dtype": ({"positives": torch.zeros(5, 1)}, TypeError, "positives: found torch.float32"),
    "positive too large": (
        {"positives": torch.full((5, 1), 9)},
        IndexError,
        r"found 9, expected a bank row in \[0, 8\]",
    ),
    "positive below 0": (
        {"positives": torch.full((5, 1), -1)},
        IndexError,
        r"found -1, expected a bank row in \[0, 8\]",
    ),
    "weight of other M": ({"positive_weight": torch.ones(5, 2)}, ValueError, r"positive_weight: found shape \[5, 2\]"),
    "weight alone": ({"positives": None}, ValueError, "positive_weight: .*without positives"),
}


@pytest.mark.parametrize("case", BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_a_bad_step_is_named_and_changes_nothing(case):
    changes, error, message = case
    bank = unit_rows(9, 4)
    arguments = dict(bank=bank.clone(), velocity=torch.zeros(9, 4), queries=unit_rows(5, 4), lse=torch.zeros(5))
    arguments |= dict(temperature=0.1, lr=1.0, momentum=0.9, row_weight=torch.full((5,), 0.2))
    arguments |= dict(positives=torch.randint(9, (5, 1)), positive_weight=torch.ones(5, 1))
    with pytest.raises(error, match=f"bank_step_: .*{message}"):
        bank_step_(**{**arguments, **changes})
    assert torch.equal(arguments["bank"], bank)


@over(*PLAIN)
@pytest.mark.parametrize("many", [0, 2])
@pytest.mark.parametrize("with_operand", [False, True])
def test_opcheck(backend: Backend, many, with_operand):
    step = Step(Case(5, 17, 8), many)
    positives = (step.positives, step.positive_weight) if many else (None, None)
    operand = torch.zeros(17, 64, dtype=torch.bfloat16) if with_operand else None
    state = step.bank, step.velocity, step.queries, step.lse
    settings = (0.1, torch.tensor(1.0), 0.9, 0.1, step.row_weight, *positives, "project", None, operand, backend.name)
    torch.library.opcheck(torch.ops.caco_fast.bank_step_, (*state, *settings))
