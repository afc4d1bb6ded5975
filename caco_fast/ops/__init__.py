"""The three bank operations; every method is built from them.

Legend: R query or key rows, K bank rows, C channels, M positives per row.
"""

from caco_fast.ops.bank_attend import bank_attend
from caco_fast.ops.bank_select import bank_select
from caco_fast.ops.bank_step import bank_step_

__all__ = ["bank_attend", "bank_select", "bank_step_"]
