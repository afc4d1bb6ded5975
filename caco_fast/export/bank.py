"""The learned bank of a run, or of a released checkpoint of CaCo or AdCo, as unit rows [K, C]."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from caco_fast import __version__
from caco_fast.errors import UserError
from caco_fast.export.base import register
from caco_fast.ops.tiling import unit_rows
from caco_fast.pretrained import Pretrained
from caco_fast.pretrained.banks import read_bank


def write_bank(pretrained: Pretrained, path: Path) -> None:
    file = pretrained.origin.get("path")
    if file is None:
        raise UserError(f"bank: {pretrained.title} has no bank, expected a run or a checkpoint of CaCo or AdCo")
    bank = read_bank(Path(file), trust=bool(pretrained.origin.get("trusted")))
    rows = unit_rows(bank.float())[0].contiguous()
    known = {"format": "pt", "caco_fast": __version__, "source_sha256": str(pretrained.origin.get("sha256", ""))}
    save_file({"bank": rows}, path, known)


def verify_bank(pretrained: Pretrained, path: Path) -> float:
    """The largest difference of a row's length from 1, of rows that are the bank's."""
    rows = load_file(path)["bank"]
    bank = read_bank(Path(pretrained.origin["path"]), trust=bool(pretrained.origin.get("trusted"))).float()
    along = (rows * bank).sum(dim=1) / torch.linalg.vector_norm(bank, dim=1)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return float(torch.stack([(along - 1).abs().max(), (lengths - 1).abs().max()]).max())


register("bank", write_bank, verify_bank, "the learned bank: unit rows [K, C]", (".safetensors",))
