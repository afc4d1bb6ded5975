"""The rows of a comparison: of a named study, of a list of configurations, or of variants of one."""

import difflib
import functools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from caco_fast.config import Config, load_config
from caco_fast.configs import find_config, shipped
from caco_fast.errors import UserError
from caco_fast.scale import load_scaled

TABLE_VI = "CaCo paper, Table VI: ImageNet, ResNet-50, 200 epochs, batch 4096, linear top-1"
TABLE_VII = "CaCo paper, Table VII: ImageNet, ResNet-50, 200 epochs, batch 1024, linear top-1"
# Name, positives, negatives, published.
POSITIVES_NEGATIVES = (
    ("None", "key", "batch", 70.2),
    ("Positive", "queue", "batch", 70.7),
    ("Negative", "key", "bank", 70.6),
    ("Positive+Negative", "bank", "bank", 71.3),
)
# As shares of the K of the base, which is the paper's 65536 in its middle row.
BANK_SIZES = ((0.5, 71.7), (1.0, 72.0), (1.5, 72.1))
STUDIES = ("positives_negatives", "bank_size", "methods")
# The small configuration of CaCo, which those of the other methods are based on.
SMALL = "quickstart"


@dataclass(frozen=True)
class Row:
    name: str
    config: str  # name or file
    settings: tuple[str, ...] = ()  # key=value
    published: float | None = None

    @property
    def slug(self) -> str:
        """The name as the beginning of a folder's name."""
        return re.sub(r"[^\w.+=-]+", "_", self.name.lower()).strip("_")

    def load(self, more: Sequence[str] = ()) -> Config:
        return _load(self.config, (*self.settings, *more))


# Several parts ask for the same, and a study has many rows.
@functools.cache
def _load(config: str, settings: tuple[str, ...]) -> Config:
    return load_scaled(find_config(config), settings)[0]


@dataclass(frozen=True)
class Study:
    name: str
    rows: tuple[Row, ...]
    source: str = ""  # of the published numbers


def make_study(given: Sequence[str], base: str | None, variants: Sequence[str], settings: Sequence[str]) -> Study:
    """The study that the arguments name.

    given: one of STUDIES, or configurations. settings: key=value of all rows.

    Raises:
        UserError: they do not go together, or two rows have the same name.
    """
    named = [name for name in given if name in STUDIES]
    if named and (len(given) > 1 or variants):
        raise UserError(
            f"{named[0]}: found more beside it, expected a named study alone; --base chooses what it varies"
        )
    if given == ["methods"] and base:
        raise UserError(f"--base: found {base} with methods, expected none; its rows are the small configurations")
    if given and not named and base:
        raise UserError(f"--base: found {base} beside configurations, expected a named study or --variant with it")
    if variants and not base:
        raise UserError("--variant: found it without --base, expected --base NAME|FILE, which is the first row")
    if not given and not base:
        raise UserError(f"found nothing to compare, expected one of {', '.join(STUDIES)}, configurations, or --base")
    for name in given:
        _require_known(name)
    study = _named(named[0], base or SMALL, settings) if named else _own(given, base, variants)
    if len(study.rows) < 2:
        raise UserError(f"found one row, {study.rows[0].name}, expected two or more; add a configuration or --variant")
    slugs = [row.slug for row in study.rows]
    if twice := sorted({row.name for row in study.rows if slugs.count(row.slug) > 1}):
        raise UserError(f"found the row {' and '.join(twice)} twice, expected rows of different names")
    return study


def _require_known(name: str) -> None:
    """Raise UserError for the misspelt name of a study. That of a configuration is refused when it is loaded."""
    near = difflib.get_close_matches(name, STUDIES, n=1)
    if near and name not in STUDIES:
        try:
            find_config(name)
        except UserError:
            raise UserError(
                f"{name}: found neither a study nor a configuration of that name; the nearest study is {near[0]}"
            ) from None


def _named(name: str, base: str, settings: Sequence[str]) -> Study:
    if name == "positives_negatives":
        rows = tuple(
            Row(
                row,
                base,
                ("method=ablation", f"ablation.positives={positives}", f"ablation.negatives={negatives}"),
                top,
            )
            for row, positives, negatives, top in POSITIVES_NEGATIVES
        )
        return Study(name, rows, TABLE_VII)
    if name == "bank_size":
        size = Row(base, base).load(settings).caco.bank_size  # type: ignore[attr-defined]
        sizes = [(round(share * size), top) for share, top in BANK_SIZES]
        return Study(name, tuple(Row(f"K {k}", base, (f"caco.bank_size={k}",), top) for k, top in sizes), TABLE_VI)
    others = [config for config in shipped() if config.startswith("small_")]
    others = [config for config in others if load_config(find_config(config)).method != "ablation"]
    return Study(name, tuple(Row(_short(config), config) for config in (SMALL, *others)))


def _own(configs: Sequence[str], base: str | None, variants: Sequence[str]) -> Study:
    if base:
        rows = [Row(_short(base), base)]
        rows += [Row(variant, base, tuple(shlex.split(variant))) for variant in variants]
        return Study("variants", tuple(rows))
    return Study("configs", tuple(Row(_short(config), config) for config in configs))


def _short(config: str) -> str:
    """The name of a configuration as a table shows it."""
    name = re.sub(r"\.ya?ml$", "", config.rpartition("/")[2])
    return "caco" if name == SMALL else name.removeprefix("small_")
