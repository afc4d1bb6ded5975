"""The evaluation of a pre-trained backbone by the protocols that papers publish: settings, results as JSON, a table."""

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from caco_fast import provenance
from caco_fast.data import DataConfig
from caco_fast.distributed import broadcast_object, rank
from caco_fast.engine.agreement import on_rank_0, require_equal_starts, together
from caco_fast.engine.launch import launched
from caco_fast.engine.precision import prepare_frozen
from caco_fast.engine.progress import log_to_console, table
from caco_fast.engine.settings import PRECISIONS
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained, open_source
from caco_fast.protocols import PROTOCOLS, Context, registered
from caco_fast.protocols.base import Registered
from caco_fast.settings import require_at_least, section, setting
from caco_fast.settings_tree import read_settings, settings_of
from caco_fast.storage import atomic_write_text

log = logging.getLogger(__name__)

# Of the JSON: a reader of another version knows that it may not understand it.
FORMAT = 1
# Settings that change the speed of an evaluation, not what it finds.
FREE = ("out", "cache", "again", "device", "cpu_threads", "collective_timeout", "data.workers", "data.prefetch")
# As the published protocols see the images of ImageNet and of other sets of files.
CROPPED = {"data.eval_resize": 256, "data.eval_size": 224}


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation; an object also has a section for every protocol: see `evaluate_class`."""

    out: str = setting("", "folder of the results; empty: RUN/evaluation, or evaluation/<name of the source>")
    cache: str = setting("", "folder of the extracted features; empty: features/ in the folder of the results")
    again: bool = setting(False, "evaluate anew, also what has a result with the same settings, weights and code")
    data: DataConfig = section(DataConfig, "images and labels; of a run folder: those of the run")
    backbone: BackboneConfig = section(BackboneConfig, "architecture of a file that does not say its own")
    batch_size: int = setting(256, "images per forward on each rank, where the protocol does not say")
    precision: str = setting("auto", "precision of the backbone: f32, tf32, bf16, fp16, or auto: as in training")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; under torchrun each rank takes its own GPU")
    cpu_threads: int = setting(0, "threads of CPU operations on each rank; 0: OMP_NUM_THREADS, or cores / local ranks")
    seed: int = setting(0, "seed of what a protocol draws: views, splits, new layers")
    deterministic: bool = setting(False, "the same results bit for bit on a GPU too, at a cost")
    collective_timeout: int = setting(600, "seconds that a rank waits for the others before the evaluation ends")

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: found '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        for name, least in (("batch_size", 1), ("cpu_threads", 0), ("seed", 0), ("collective_timeout", 1)):
            require_at_least(name, getattr(self, name), least)


def evaluate_class() -> type[EvaluateConfig]:
    """EvaluateConfig with a section for each protocol that is registered by now."""
    return _with_sections(tuple(PROTOCOLS.items()))


@functools.lru_cache
def _with_sections(protocols: tuple[tuple[str, Registered], ...]) -> type[EvaluateConfig]:
    fields = [(name, entry.config, section(entry.config, entry.help)) for name, entry in protocols]
    return dataclasses.make_dataclass("EvaluateConfig", fields, bases=(EvaluateConfig,), frozen=True)


def load_settings(arguments: Sequence[str], pretrained: Pretrained | None = None) -> EvaluateConfig:
    """The settings of `key=value` arguments, with defaults that follow from the source.

    Raises:
        UserError: an unknown key (the nearest valid one is named), or a mistyped value.
    """
    kind = evaluate_class()
    given = read_settings(kind, overrides=arguments)
    return given if pretrained is None else read_settings(kind, (), arguments, _defaults(given, pretrained))


def _defaults(given: EvaluateConfig, pretrained: Pretrained) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if pretrained.mean is not None and pretrained.std is not None:
        chosen |= {"data.mean": list(pretrained.mean), "data.std": list(pretrained.std)}
    if pretrained.config is None:
        named = given.data.source in ("embedded", "cifar10", "cifar100")
        return chosen if named else CROPPED | chosen
    chosen["precision"] = (
        "auto" if pretrained.config.trainer.precision == "auto" else pretrained.config.trainer.precision
    )
    of_run = settings_of(pretrained.config.data)
    free = ("loader", "jitter", "imbalance", "bad_image_limit", "workers", "prefetch")
    wanted = {name: value for name, value in of_run.items() if name not in free and value is not None}
    if given.data.path or given.data.source != DataConfig().source:
        # Other images, of which the run's settings say nothing but their size.
        wanted = {name: value for name, value in wanted.items() if name in ("eval_resize", "eval_size", "mean", "std")}
    return chosen | {f"data.{name}": value for name, value in wanted.items()}


def evaluate(
    source: str, protocols: Sequence[str], arguments: Sequence[str] = (), trust: bool = False
) -> dict[str, dict[str, Any]]:
    """Evaluate a backbone by protocols, one after the other, and return what their JSON files hold, by protocol.

    source: see docs/weights.md. protocols: names, such as ["knn", "linear"]. arguments: `key=value` settings.
    trust: whether pickled classes in a file of weights are loaded, which runs code of it.

    Raises:
        UserError: anything that the user can correct, in one line.
        Interrupted: a signal asked to stop; the same call continues.
        RankLost, ReportedElsewhere: another rank failed; see engine/ranks.py.
    """
    for name in protocols:
        registered(name)
    first = load_settings(arguments)
    with launched(first, section="") as device:
        log_to_console()
        require_equal_starts(
            {"source": source, **settings_of(first), "code": provenance.code()},
            "start all ranks with the same settings and the same code",
        )
        pretrained = together(lambda: open_source(source, first.backbone, trust=trust))
        config = together(lambda: load_settings(arguments, pretrained))
        results: dict[str, dict[str, Any]] = {}
        context = _context(config, pretrained, device)
        try:
            for name in protocols:
                results[name] = _run(name, config, context)
        finally:
            # What was found before a protocol failed is written, and should be seen.
            if rank() == 0 and results:
                _announce(results, config, context.folder)
        return results


def _announce(results: Mapping[str, Mapping[str, Any]], config: EvaluateConfig, folder: Path) -> None:
    show(results)
    files = [[f"{_slug(name, config)}.json", *record["files"]] for name, record in results.items()]
    log.info("written to %s: %s", folder, ", ".join(sum(files, [])))


def _context(config: EvaluateConfig, pretrained: Pretrained, device: torch.device) -> Context:
    precision, autocast = prepare_frozen(config.precision, device, config.deterministic)
    torch.manual_seed(config.seed)
    origin = pretrained.origin
    log.info(
        "source: %s; %s, %d channels in, %d features out; on %s in %s",
        origin.get("path") or origin.get("source"),
        pretrained.architecture.name,
        pretrained.channels,
        pretrained.width,
        device,
        precision,
    )
    folder = Path(config.out).expanduser() if config.out else _folder(pretrained)
    on_rank_0(lambda: _make(folder))
    return Context(
        pretrained,
        config.data,
        device=device,
        autocast=autocast,
        batch_size=config.batch_size,
        seed=config.seed,
        folder=folder,
        cache=Path(config.cache).expanduser().absolute() if config.cache else Path("features"),
    )


def _folder(pretrained: Pretrained) -> Path:
    return pretrained.folder / "evaluation" if pretrained.folder else Path("evaluation", pretrained.title)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: can't make {folder}: {error.strerror}; set out=DIR") from None


def _run(name: str, config: EvaluateConfig, context: Context) -> dict[str, Any]:
    """The record of one protocol: of the file if that has it already, else measured and written (collective)."""
    settings = getattr(config, name)
    path = context.folder / f"{_slug(name, config)}.json"
    asked = _asked(name, config, context)
    known = broadcast_object(_known(path, asked) if not config.again else None)
    if known:
        log.info("%s: %s holds the result for these settings, weights and code", name, path)
        return known
    log.info("%s: %s", name, PROTOCOLS[name].help)
    start = time.monotonic()
    result = PROTOCOLS[name].run(context, settings)
    record = {
        "format": FORMAT,
        "protocol": name,
        "identity": asked,
        "source": context.pretrained.origin | {"title": context.pretrained.title},
        "architecture": settings_of(context.pretrained.architecture),
        "settings": {key: value for key, value in settings_of(config).items() if _concerns(key, name)},
        **dataclasses.asdict(result),
        "headline": next(iter(result.metrics), None),
        "seconds": round(time.monotonic() - start, 1),
        "versions": provenance.versions(),
        "machine": provenance.hardware(),
        **provenance.commit(),
    }
    on_rank_0(lambda: _write(path, record))
    return record


def _slug(name: str, config: EvaluateConfig) -> str:
    """The name of a protocol's file, with its preset if it has one: linear-caco."""
    preset = getattr(getattr(config, name), "preset", "")
    return f"{name}-{preset}" if preset else name


def _concerns(key: str, protocol: str) -> bool:
    """Whether a setting belongs to a protocol: its own section does, and what all protocols read."""
    part = key.partition(".")[0]
    return part == protocol or part not in PROTOCOLS


def _asked(name: str, config: EvaluateConfig, context: Context) -> str:
    """A name for all that a result depends on: settings, weights and code."""
    settings = {key: value for key, value in settings_of(config).items() if _concerns(key, name) and key not in FREE}
    text = json.dumps([settings, context.pretrained.weights_sha256, provenance.code()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _known(path: Path, asked: str) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    complete = all((path.parent / name).exists() for name in record.get("files", []))
    return record if record.get("identity") == asked and complete else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    try:
        atomic_write_text(path, json.dumps(record, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; make room, and start again") from None


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder of results, by the names of their files. UserError if there are none."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = {name: record for name, record in found.items() if "protocol" in record}
    if not found:
        raise UserError(f"--table {folder}: found no results, expected the folder that an evaluation wrote")
    return found


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Show the figures of results as a table, each next to what papers published."""
    columns = ["protocol", "what", "found", "published"]
    table("per cent, unless the name says otherwise", columns, list(rows_of(results)))


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The same table as Markdown."""
    lines = ["| protocol | what | found | published |", "|---|---|--:|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows_of(results)])


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """The rows of a table of results: protocol, what, found, published."""
    for name, record in results.items():
        for metric, value in record["metrics"].items():
            first = metric == record["headline"]
            error = record["standard_error"] if first else None
            spread = f" ± {error:.1f}" if error is not None else ""
            beside = [each for each in record["published"] if (each.get("metric") or record["headline"]) == metric]
            published = "; ".join(f"{each['value']:g} {each['who']}" for each in beside)
            yield [name if first else "", metric, f"{value:.1f}{spread}", published or ("not known" if first else "")]
