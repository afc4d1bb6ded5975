"""An evaluation that a rank has no images for ends on all ranks alike."""

import pytest
import torch

from caco_fast.distributed import rank
from caco_fast.errors import UserError
from caco_fast.evaluate import EvaluationConfig, Evaluator
from tests.ranks import run_ranks

Batches = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def batches(count: int) -> Batches:
    return [(torch.rand(4, 1, 2, 2), torch.arange(4) % 2, torch.arange(4)) for _ in range(count)]


def evaluator(train: int, test: int) -> Evaluator:
    config = EvaluationConfig(k=[1])
    return Evaluator(
        config, batches(train), batches(test), classes=2, denormalise=lambda images: images, device=torch.device("cpu")
    )


def refusal() -> str:
    with pytest.raises(UserError) as refused:
        evaluator(train=2, test=1 - rank()).raw_scores()
    return str(refused.value)


def test_a_rank_without_test_images_is_one_line_on_every_rank() -> None:
    line = "evaluation: found [1, 0] batches of test images on the ranks, expected at least one on every rank"
    assert [found.split(";")[0] for found in run_ranks(refusal, 2)] == [line, line]


def test_scores_are_per_cent_by_k() -> None:
    assert evaluator(train=2, test=2).raw_scores().keys() == {"knn_1"}


def test_few_labels_are_scored_with_the_others() -> None:
    subject = evaluator(train=8, test=2)
    for number, (_, _, index) in enumerate(subject.train):
        index += 4 * number
    subject.config = EvaluationConfig(k=[1], few_labels=4, linear_probe=True)
    scores = subject.raw_scores()
    assert list(scores) == ["knn_1", "linear", "few"] and 0 <= scores["few"] <= 100
    with pytest.raises(UserError, match="^evaluation.few_labels: found 17, but class 0 has 16 images"):
        subject.config = EvaluationConfig(k=[1], few_labels=17)
        subject.raw_scores()


def test_one_label_of_a_class_is_refused() -> None:
    with pytest.raises(UserError, match="evaluation.few_labels: found 1, expected 0 or at least 2"):
        EvaluationConfig(few_labels=1)


class Unreadable(list):
    """The batches of a share of which rank 1 can read no image."""

    def __iter__(self):
        if rank() == 1:
            raise UserError("none of the 4 images to evaluate on can be read; check data.path")
        return super().__iter__()


def refusals() -> list[str]:
    found = []
    for ask in (Evaluator.raw_scores, Evaluator.raw_bytes):
        subject = evaluator(train=2, test=1)
        subject.test = Unreadable(subject.test)
        with pytest.raises(UserError) as refused:
            ask(subject)
        found.append(str(refused.value))
    return found


def test_a_share_that_one_rank_can_not_read_is_one_line_on_every_rank() -> None:
    line = "none of the 4 images to evaluate on can be read; check data.path"
    assert run_ranks(refusals, 2) == [[line, line]] * 2
