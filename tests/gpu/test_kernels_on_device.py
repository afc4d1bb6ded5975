"""Every test of the operations in tests/csrc, on the GPU in place of the emulation."""

import pytest
import torch

from tests.csrc.test_bank_attend import *  # noqa: F403
from tests.csrc.test_bank_select import *  # noqa: F403
from tests.csrc.test_bank_step import *  # noqa: F403
from tests.csrc.test_ema_update import *  # noqa: F403
from tests.csrc.test_lars_step import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
