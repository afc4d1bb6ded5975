"""A released checkpoint of CaCo or AdCo as the state that a run continues from: encoders, projectors, bank, velocity.

Legend: K bank rows, C embedding size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.models.layouts import COUNTER, Shapes
from caco_fast.models.weights import read_weights

QUERY, KEY = "module.encoder_q.", "module.encoder_k."
# Names of the head at the end of the backbone, there and here.
HEAD, PROJECTOR = "fc.", "projector."


class Released(NamedTuple):
    """What a released checkpoint holds, under the names of ours."""

    method: str  # caco or adco
    encoders: dict[str, Tensor]
    bank: Tensor  # [K, C], rows of any length
    velocity: Tensor  # [K, C]
    epochs: int  # that it was trained for


def read_released(file: str, shapes: Shapes, *, trust: bool = False) -> Released:
    """The whole state in a released checkpoint.

    shapes: of both encoders, by the names that `EncoderPair.state_dict` has.

    Raises:
        UserError: it is no such checkpoint, or not exactly the tensors of these encoders are in it.
    """
    where, path = f"--import {file}", Path(file).expanduser()
    tree = read_weights(str(path), "--import", trust)
    held, bank = tree.get("state_dict"), tree.get("Memory_Bank")
    if not (isinstance(held, Mapping) and isinstance(bank, Mapping)):
        raise UserError(
            f"{where}: found the keys {', '.join(map(str, tree))[:80]}, expected state_dict and Memory_Bank, as CaCo "
            "and AdCo release them; of other files take the backbone: backbone.init=FILE"
        )
    missing = [name for name in ("W", "v") if not isinstance(bank.get(name), Tensor)]
    if missing or bank["W"].ndim != 2 or bank["W"].shape != bank["v"].shape:
        found = {name: list(value.shape) for name, value in bank.items() if isinstance(value, Tensor)}
        raise UserError(f"{where}: found the bank {found}, expected W and v, both [C, K]; fetch the file again")
    epochs = tree.get("epoch")
    if not isinstance(epochs, int):
        raise UserError(f"{where}: found the epoch {epochs!r}, expected a whole number")
    method = "adco" if f"{QUERY}{HEAD}2.bias" in held else "caco"
    rows, velocity = (bank[name].T.contiguous() for name in ("W", "v"))
    return Released(method, _encoders(held, shapes, where), rows, velocity, epochs)


def _encoders(held: Mapping[str, Any], wanted: Shapes, where: str) -> dict[str, Tensor]:
    """Both encoders under the names of ours: exactly those of the file, with their shapes."""
    renamed = {_name(key): value for key, value in held.items() if isinstance(value, Tensor)}
    state = {key: value for key, value in renamed.items() if key is not None}
    missing = [key for key in wanted if key not in state and not _may_lack(key)]
    surplus = [key for key in state if key not in wanted]
    reshaped = [
        f"{key} (found {list(state[key].shape)}, expected {list(shape)})"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    problems = [
        f"{len(names)} {what}, such as {names[0]}"
        for what, names in (("are missing", missing), ("differ in shape", reshaped), ("have no place here", surplus))
        if names
    ]
    if problems:
        raise UserError(
            f"{where}: found {len(state)} tensors of two encoders, expected {len(wanted)}: {'; '.join(problems)}; set "
            "backbone and projector to the architecture of the file"
        )
    return state


def _name(key: str) -> str | None:
    """module.encoder_q.fc.0.weight -> query.projector.0.weight; None for what belongs to no encoder."""
    for prefix, encoder in ((QUERY, "query"), (KEY, "key")):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            head = name.startswith(HEAD)
            return f"{encoder}.{PROJECTOR}{name.removeprefix(HEAD)}" if head else f"{encoder}.backbone.{name}"
    return None


def _may_lack(key: str) -> bool:
    """BatchNorm's counters, which nothing reads, and what only this package has."""
    return key.endswith(COUNTER) or key.startswith("shuffle.")


def imported_state(
    fresh: Mapping[str, Any], released: Released, bank: str, epoch: int, phase: str, steps_per_epoch: int
) -> dict[str, Any]:
    """The state of a run that continues from a released checkpoint at the start of an epoch.

    fresh: the state of the run before its first step, whose optimiser is at rest. bank: name of the bank in the method.
    phase: name of the training. The key encoder still lacks the EMA that the released code does at the beginning of a
    step.
    """
    encoders = {key: value for key, value in fresh["encoders"].items() if _may_lack(key)} | released.encoders
    rows = {f"{bank}.bank": released.bank.to(torch.float32), f"{bank}.velocity": released.velocity.to(torch.float32)}
    position = dict(fresh["position"]) | {
        "phase": phase,
        "step": epoch * steps_per_epoch,
        "total_steps": epoch * steps_per_epoch,
        "epochs_ended": epoch,
        "imported_steps": epoch * steps_per_epoch,
    }
    return {
        **fresh,
        "encoders": encoders,
        "method": dict(fresh["method"]) | rows,
        "position": position,
        "loader": dict(fresh["loader"]) | {"epoch": epoch, "step": 0},
    }
