"""Learning rate, warm-up and EMA momentum over a run of 100 epochs of 7 steps, 10 of them warm-up."""

import math
from typing import Any

import pytest

from caco_fast.errors import UserError
from caco_fast.optim import Schedule, ScheduleConfig

EPOCHS, STEPS, WARM = 100, 7, 10
LAST = EPOCHS * STEPS - 1


def schedule(**settings: Any) -> Schedule:
    return Schedule(ScheduleConfig(**{"warmup_epochs": WARM, **settings}), lr=2.0, epochs=EPOCHS, steps_per_epoch=STEPS)


def test_lr_per_step() -> None:
    run = schedule()
    warm = WARM * STEPS
    assert run.lr_at(0) == pytest.approx(2.0 / warm)
    assert run.lr_at(warm // 2 - 1) == pytest.approx(1.0)
    assert run.lr_at(warm - 1) == run.lr_at(warm) == 2.0
    middle = (warm + EPOCHS * STEPS) // 2
    assert run.lr_at(middle) == pytest.approx((2.0 + 0.02) / 2)
    assert run.lr_at(EPOCHS * STEPS) == pytest.approx(0.02)
    assert 0.02 < run.lr_at(LAST) < 0.021
    assert all(run.lr_at(s) > run.lr_at(s + 1) for s in range(warm, LAST))


def test_lr_per_epoch_stands_still_within_an_epoch() -> None:
    run = schedule(per="epoch")
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        wanted = 2.0 * (epoch + 1) / WARM
        if epoch >= WARM:
            wanted = 0.02 + 1.98 * (1 + math.cos(math.pi * (epoch - WARM) / (EPOCHS - WARM))) / 2
        assert [run.lr_at(s) for s in steps] == pytest.approx([wanted] * STEPS)


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_warm_up_ends_at_1_and_stays_there(per: str) -> None:
    run = schedule(per=per)
    shares = [run.warmup_at(s) for s in range(LAST + 1)]
    assert shares[0] == pytest.approx(1 / (WARM * STEPS) if per == "step" else 1 / WARM)
    assert shares[: WARM * STEPS] == sorted(shares[: WARM * STEPS])
    assert shares[WARM * STEPS - 1 :] == [1.0] * (LAST + 2 - WARM * STEPS)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    run = schedule(warmup_epochs=0)
    assert (run.lr_at(0), run.warmup_at(0)) == (2.0, 1.0)


def test_a_warm_up_as_long_as_the_run() -> None:
    run = schedule(warmup_epochs=EPOCHS)
    assert run.lr_at(LAST) == pytest.approx(2.0)


def test_key_momentum_rises_from_m0_to_1_over_the_run() -> None:
    run = schedule(key_momentum=0.99)
    assert run.key_momentum_at(0) == pytest.approx(0.99)
    assert run.key_momentum_at(EPOCHS * STEPS // 2) == pytest.approx(0.995)
    assert run.key_momentum_at(EPOCHS * STEPS) == 1.0
    values = [run.key_momentum_at(s) for s in range(LAST + 1)]
    assert values == sorted(values) and values[-1] < 1.0


def test_key_momentum_per_epoch_is_the_formula_of_the_paper() -> None:
    run = schedule(key_momentum=0.9, per="epoch")
    for epoch in (0, 1, 50, 99):
        wanted = 1 - (1 - 0.9) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        assert run.key_momentum_at(epoch * STEPS) == run.key_momentum_at(epoch * STEPS + 6) == pytest.approx(wanted)


def test_key_momentum_may_stay() -> None:
    run = schedule(key_momentum=0.999, key_momentum_rises=False)
    assert {run.key_momentum_at(s) for s in (0, 300, LAST)} == {0.999}


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"per": "week"}, "schedule.per: found 'week', expected step or epoch"),
        ({"warmup_epochs": -1.0}, "schedule.warmup_epochs: found -1.0, expected 0 or more"),
        ({"final_ratio": -0.01}, "schedule.final_ratio: found -0.01, expected a number in [0, 1]"),
        ({"key_momentum": 1.5}, "schedule.key_momentum: found 1.5, expected a number in [0, 1]"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        schedule(**settings)
    assert str(error.value) == line


def test_a_warm_up_as_long_as_the_run_is_named(caplog) -> None:
    Schedule(ScheduleConfig(warmup_epochs=3.0), lr=1.0, epochs=4, steps_per_epoch=2)
    assert caplog.text == ""
    Schedule(ScheduleConfig(warmup_epochs=4.0), lr=1.0, epochs=4, steps_per_epoch=2)
    assert "schedule.warmup_epochs 4 is no less than trainer.epochs 4" in caplog.text


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_the_lr_falls_at_each_milestone_in_place_of_the_cosine(per: str) -> None:
    run = schedule(milestones=[20, 50], milestone_factor=0.5, per=per)
    assert run.lr_at(WARM * STEPS - 1) == pytest.approx(2.0)
    wanted = {WARM: 2.0, 19: 2.0, 20: 1.0, 49: 1.0, 50: 0.5, EPOCHS - 1: 0.5}
    for epoch, lr in wanted.items():
        for step in (epoch * STEPS, (epoch + 1) * STEPS - 1):
            assert run.lr_at(step) == pytest.approx(lr), epoch
    assert run.lr_at(0) == schedule(per=per).lr_at(0)


@pytest.mark.parametrize("milestones", [[50, 20], [20, 20], [0, 20], [5, 20]])
def test_milestones_ascend_from_the_end_of_the_warm_up(milestones: list[int]) -> None:
    with pytest.raises(
        UserError, match=r"schedule.milestones: found .*, expected ascending epochs after the warm-up of 10"
    ):
        schedule(milestones=milestones)


def test_a_factor_above_1_is_refused() -> None:
    with pytest.raises(UserError, match="schedule.milestone_factor: found 10.0, expected a number in"):
        schedule(milestone_factor=10.0)
