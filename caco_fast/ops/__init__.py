"""The three bank operations, which every method is built from, and two on lists of tensors: EMA and LARS.

Legend: R query or key rows, K bank rows, C channels, M positives per row.
"""

from caco_fast.ops.bank_attend import bank_attend
from caco_fast.ops.bank_select import bank_select
from caco_fast.ops.bank_step import bank_step_
from caco_fast.ops.ema_update import ema_update_
from caco_fast.ops.lars_step import lars_step_

__all__ = ["bank_attend", "bank_select", "bank_step_", "ema_update_", "lars_step_"]
