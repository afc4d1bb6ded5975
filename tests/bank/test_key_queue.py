"""KeyQueue: a ring of the latest keys.

Legend: K queue rows, C channels, R keys.
"""

import pytest
import torch
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue
from caco_fast.errors import UserError


def test_starts_with_unit_rows():
    queue = KeyQueue(9, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(queue.queue.norm(dim=1), torch.ones(9))
    assert queue.pointer.item() == 0


@pytest.mark.parametrize("size", [1, 7, 12])
def test_holds_the_latest_keys_like_a_list(size):
    """Batches of no divisor of K, empty, equal to it and several times larger, against a plain list."""
    queue = KeyQueue(size, 3)
    ring, pointer = queue.queue.clone(), 0
    for count in (5, 0, 4, size, 3 * size + 2, 1, 2 * size):
        keys = normalize(torch.randn(count, 3), dim=1)
        queue.enqueue(keys)
        for key in keys:
            ring[pointer] = key
            pointer = (pointer + 1) % size
        assert torch.equal(queue.queue, ring)
        assert queue.pointer.item() == pointer


def test_keys_are_kept_as_constants_in_f32():
    queue = KeyQueue(4, 3)
    queue.enqueue(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert queue.queue.dtype == torch.float32
    assert not queue.queue.requires_grad
    assert torch.equal(queue.queue[:2], torch.ones(2, 3))


def test_state_goes_round_and_another_size_is_refused():
    queue, other = KeyQueue(5, 3), KeyQueue(5, 3)
    queue.enqueue(torch.ones(3, 3))
    assert list(queue.state_dict()) == ["queue", "pointer"]
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.queue, queue.queue)
    assert other.pointer.item() == 3
    with pytest.raises(UserError, match=r"KeyQueue: the saved 'queue' has shape \[6, 3\], expected \[5, 3\]"):
        queue.load_state_dict(KeyQueue(6, 3).state_dict())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"KeyQueue.enqueue: keys: found shape \[2, 4\], expected \[R, 3\]"):
        KeyQueue(5, 3).enqueue(torch.ones(2, 4))
    with pytest.raises(UserError, match="the key queue: found size 0 and dim 3"):
        KeyQueue(0, 3)


def test_select_finds_the_nearest_key_and_rows_returns_it():
    queue = KeyQueue(5, 3)
    # A key that is not of unit length is compared, and returned, as one that is.
    queue.enqueue(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))
    index, similarity = queue.select(torch.tensor([[0.8, 0.6, 0.0], [-0.6, -0.8, 0.0]]))
    assert index.tolist() == [0, 4]
    torch.testing.assert_close(similarity, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(queue.rows(index), torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))
