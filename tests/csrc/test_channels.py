"""Every number of channels that the kernels serve, on every path. Legend: C channels."""

import pytest

from tests.csrc import test_bank_attend, test_bank_select, test_bank_step
from tests.csrc.cases import Case


@pytest.mark.parametrize("channels", range(64, 513, 16))
def test_every_sixteenth_channel_count_is_served(cuda_ops, emulated, channels):
    # Drawn so that no unit row lies midway between two fp16 numbers, where the order of its norm's sum would decide.
    case = Case(7, 34, channels)
    (_, velocity), (_, expected), bound = test_bank_step.run(case, 1)
    assert test_bank_step.worst(velocity, expected, bound) <= 1
    test_bank_attend.test_attend_is_exact_up_to_the_rounding_of_p(cuda_ops, emulated, case)
    test_bank_select.test_select_finds_the_most_similar_row(cuda_ops, emulated, case)
