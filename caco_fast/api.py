"""`caco_fast.pretrain`: a whole training run, called from Python."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caco_fast.configs import find_config

# Read when torch is imported, so it has no effect after that. Spinning OpenMP threads take the cores from the loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pretrain(
    config: str | Path = "quickstart",
    *,
    data: str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: str | Path = "never",
    **settings: Any,
) -> dict[str, Any]:
    """Pre-train an encoder, evaluate it, and return the figures that summary.json holds.

        import caco_fast

        summary = caco_fast.pretrain(
            config="quickstart", out="runs/a", trainer={"epochs": 2}, **{"caco.bank_size": 4096}
        )
        print(summary["knn_trained"])

    The same run as `caco-fast train --config quickstart run.folder=runs/a trainer.epochs=2 caco.bank_size=4096`.
    It runs in this process, also in a notebook or in a script without `if __name__ == "__main__"`.

    Args:
        config: a shipped configuration ("quickstart"; `caco-fast train --list-configs` shows all) or a YAML file.
        data: "embedded" (the Fashion-MNIST subset in the package), a folder with train/ and val/ (for "own_images" any
            folder of images), an index file (`.npz`), or `.tar` shards. A mapping sets any field of the section, such
            as `{"source": "cifar10", "path": "data/cifar10"}`. None: as the configuration says.
        out: the run folder. None: runs/<name of the configuration>.
        resume: "never" starts, and refuses a folder that holds a run. "auto" continues from the newest checkpoint of
            the folder, or starts if there is none. A path continues from that checkpoint.
        settings: any other setting. A section is a mapping that changes only the fields it names. A dotted key such
            as "caco.bank_size" sets one field.

    Raises:
        UserError: something that the user can correct, in one line.
        Interrupted: Ctrl-C, SIGTERM or the like ended the run after a checkpoint; resume="auto" continues.
    """
    from caco_fast.scale import load_scaled
    from caco_fast.training import train

    file = find_config(config)
    given = _data_settings(data, file) | settings
    if out is not None:
        given["run.folder"] = os.fspath(out)
    loaded, chosen = load_scaled(file, [f"{key}={_as_text(value)}" for key, value in given.items()])
    if chosen:
        print(chosen)
    with _torch_as_before():
        folder = os.path.expanduser(loaded.run.folder or f"runs/{file.stem}")
        return train(loaded, Path(folder), os.path.expanduser(resume))


def _data_settings(data: str | Path | Mapping[str, Any] | None, file: Path) -> dict[str, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {"data": data}
    if data == "embedded":
        return {"data.source": "embedded"}
    path = os.fspath(data)
    source = "index" if path.endswith(".npz") else "webdataset" if ".tar" in path else "folder"
    if source == "folder":
        from caco_fast.config import load_config

        # A configuration for any tree of images reads train/ and val/ too.
        source = "images" if load_config(file).data.source == "images" else source
    return {"data.source": source, "data.path": path}


def _as_text(value: Any) -> str:
    """A value as the command line takes it. JSON is valid there, and paths become text."""
    return json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def _torch_as_before() -> Iterator[None]:
    """Put back what a run sets for the whole process, for the cells of a notebook that come next."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic = cudnn
