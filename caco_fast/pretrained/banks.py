"""The learned bank in a checkpoint of ours or in a released one of CaCo or AdCo."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from caco_fast.engine.checkpoint import FORMAT, load_state
from caco_fast.errors import UserError
from caco_fast.models.weights import read_weights


def learned_banks(method: Mapping[str, Tensor]) -> list[Tensor]:
    """The learned banks [K, C] in the state of a method; a queue of keys is none."""
    return [value for key, value in method.items() if key.split(".")[-1] == "bank" and value.ndim == 2]


def key_queues(method: Mapping[str, Tensor]) -> list[Tensor]:
    """The queues of keys [K, C] in the state of a method."""
    return [value for key, value in method.items() if key.split(".")[-1] == "queue" and value.ndim == 2]


def read_bank(path: Path, *, trust: bool = False) -> Tensor:
    """The rows [K, C] of the bank in a file, as they are stored: of any length.

    Raises:
        UserError: the file has no learned bank.
    """
    tree = read_weights(str(path), "source", trust)
    if tree.get("format") == FORMAT:
        found = learned_banks(load_state(path)["method"])
    else:
        bank = tree.get("Memory_Bank")
        # Released banks have a row in each column.
        found = [bank["W"].T] if isinstance(bank, Mapping) and isinstance(bank.get("W"), Tensor) else []
    if len(found) != 1:
        raise UserError(f"bank: found {len(found)} learned banks in {path}, expected one; take a run of caco or adco")
    return found[0]
