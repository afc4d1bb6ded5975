"""Settings of the data: where the images come from, how they are read, and the recipe of the views."""

from collections.abc import Sequence
from dataclasses import dataclass

from caco_fast.errors import UserError
from caco_fast.host import cores_of_rank
from caco_fast.settings import setting

SOURCES = ("folder", "images", "index", "webdataset", "cifar10", "cifar100", "embedded")
LOADERS = ("auto", "dali", "torchvision", "memory")
JITTERS = ("exact", "fast")
INTERPOLATIONS = ("bilinear", "bicubic")
IMBALANCES = ("none", "linear", "exponential")
# Advice for data without test images or labels.
NO_EVALUATION = "turn evaluation off: evaluation.every_epochs=0, with evaluation.baselines and .linear_probe false"


@dataclass(frozen=True)
class ViewConfig:
    """One kind of view, drawn `count` times from every image: the published augmentation, in its published order.

    RandomResizedCrop, colour jitter, grey, blur, solarise, flip, normalise (MoCo v2, arXiv 2003.04297; BYOL,
    2006.07733; CaCo's view a is blur_p 1, its view b blur_p 0.1 and solarize_p 0.2).
    """

    count: int = setting(1, "how many views of this kind each image gives (>= 1)")
    size: int = setting(224, "side of the square view in pixels (>= 1)")
    scale: tuple[float, float] = setting(
        (0.2, 1.0), "share of the image's area that a crop covers: smallest, largest (0 to 1)"
    )
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "aspect ratio of a crop, width / height: smallest, largest")
    flip_p: float = setting(0.5, "probability of a horizontal flip (0 to 1)")
    jitter_p: float = setting(0.8, "probability of the colour jitter (0 to 1)")
    brightness: float = setting(0.4, "jitter: brightness factor drawn from 1 -+ this (>= 0)")
    contrast: float = setting(0.4, "jitter: contrast factor drawn from 1 -+ this (>= 0)")
    saturation: float = setting(0.2, "jitter: saturation factor drawn from 1 -+ this (>= 0); not for grey images")
    hue: float = setting(0.1, "jitter: hue shift drawn from -+ this, in turns (0 to 0.5); not for grey images")
    grey_p: float = setting(0.2, "probability of dropping the colour (0 to 1); not for grey images")
    blur_p: float = setting(0.5, "probability of a Gaussian blur (0 to 1)")
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0), "sigma of the blur in pixels of the view: smallest, largest (> 0)"
    )
    solarize_p: float = setting(0.0, "probability of solarising: values of 128 and above are inverted (0 to 1)")

    def validate(self, where: str = "view") -> None:
        """Raise UserError for the first field that is out of range; `where` names the entry, as in `views[1]`."""
        for name in ("count", "size"):
            _require(f"{where}.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("flip_p", "jitter_p", "grey_p", "blur_p", "solarize_p"):
            value = getattr(self, name)
            _require(f"{where}.{name}", value, 0 <= value <= 1, "a probability between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
            _require(f"{where}.{name}", getattr(self, name), 0 <= getattr(self, name) < float("inf"), "0 or more")
        _require(f"{where}.hue", self.hue, 0 <= self.hue <= 0.5, "a share of the colour circle between 0 and 0.5")
        for name, largest in (("scale", 1.0), ("ratio", float("inf")), ("blur_sigma", float("inf"))):
            pair = list(getattr(self, name))
            upper = "" if largest == float("inf") else f" <= {largest:g}"
            valid = len(pair) == 2 and 0 < pair[0] <= pair[1] <= largest
            _require(f"{where}.{name}", pair, valid, f"[low, high] with 0 < low <= high{upper}")


def validate_views(views: Sequence[ViewConfig]) -> None:
    """Raise UserError for the first view that can't be drawn, or if there are none."""
    if not views:
        raise UserError("views: found none, expected at least one entry; give a view to draw")
    for number, view in enumerate(views):
        view.validate(f"views[{number}]")


def _require(key: str, found: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UserError(f"{key}: found {found}, expected {expected}")


_PATHS = {
    "index": ("the file that tools/index_data.py wrote", "data.path=FILE"),
    "webdataset": ("the directory of the shards or a pattern", "data.path=DIR or data.path='DIR/train-{000..146}.tar'"),
}


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are read."""

    source: str = setting(
        "folder",
        "folder (path/train/<class>/*.JPEG), images (every image below path, without labels unless it has train/ and "
        "val/), index (file by tools/index_data.py), webdataset (.tar shards), cifar10 or cifar100 "
        "(release files), or embedded (Fashion-MNIST)",
    )
    path: str = setting(
        "",
        "directory of the data; index: the file; webdataset: also a pattern, DIR/train-{000..146}.tar; embedded: none",
    )
    root: str = setting("", "index: directory of the images, if they are not where the index says")
    imbalance: str = setting(
        "none",
        "part of each class to train on: none (all of it), linear or exponential in the class's number, as in CACR; "
        "evaluation takes all images",
    )
    loader: str = setting(
        "auto",
        "dali, torchvision (worker processes, slower), memory (whole set in memory) or auto (memory for small sets, "
        "else dali, or torchvision if DALI is not installed)",
    )
    jitter: str = setting(
        "exact", "colour jitter: exact (torchvision's) or fast (one linear map of the colours, see docs/data.md)"
    )
    workers: int | None = setting(
        None, "worker processes of a rank, or threads with dali; 0: no process; null: one per core, up to 12"
    )
    prefetch: int = setting(2, "batches that each worker, or dali, prepares ahead (>= 1)")
    mean: list[float] | None = setting(None, "mean of each channel in [0, 1] to subtract; null: the source's own")
    std: list[float] | None = setting(None, "standard deviation of each channel to divide by; null: the source's own")
    eval_resize: int | None = setting(
        None, "evaluation: the shorter side is resized to this many pixels; null: no resize"
    )
    eval_size: int | None = setting(None, "evaluation: side of the centre crop in pixels; null: no crop")
    eval_interpolation: str = setting(
        "bilinear", "evaluation: how images are resized: bilinear, or bicubic as BYOL and DINO do, by PIL alone"
    )
    max_pixels: int = setting(178_956_970, "an image with more pixels than this is a bad image (>= 1)")
    bad_image_limit: float = setting(
        0.01, "share of the training set that may be unreadable (0 to 1); all ranks together count at an epoch's end"
    )

    def worker_processes(self) -> int:
        """`workers`, or as many as this rank has cores."""
        if self.workers is not None:
            return self.workers
        return min(12, cores_of_rank())

    def validate(self, needs_path: bool = True) -> None:
        """Raise UserError for the first field that is unknown, out of range or at odds with another; opens no file.

        `needs_path`: whether the images are to be found by these settings, and not by a source that is there already.
        """
        for name, known in (
            ("source", SOURCES),
            ("imbalance", IMBALANCES),
            ("loader", LOADERS),
            ("jitter", JITTERS),
            ("eval_interpolation", INTERPOLATIONS),
        ):
            value = getattr(self, name)
            _require(f"data.{name}", f"'{value}'", value in known, f"one of {', '.join(known)}")
        if needs_path:
            self._validate_place()
        for name, least in (("workers", 0), ("prefetch", 1), ("max_pixels", 1), ("eval_resize", 1), ("eval_size", 1)):
            value, optional = getattr(self, name), "" if name in ("prefetch", "max_pixels") else ", or null"
            _require(f"data.{name}", value, value is None or value >= least, f"{least} or more{optional}")
        if self.std is not None:
            _require("data.std", list(self.std), min(self.std, default=0.0) > 0, "values above 0, one for each channel")
        share = self.bad_image_limit
        _require("data.bad_image_limit", share, 0 <= share <= 1, "a share between 0 and 1")
        if self.loader == "torchvision":
            require_exact_jitter(self.jitter)

    def _validate_place(self) -> None:
        if self.source != "embedded" and not self.path:
            expected, example = _PATHS.get(self.source, ("the directory of the data", "data.path=DIR"))
            raise UserError(f"data.path: found nothing, but the {self.source} source needs {expected}; set {example}")
        if self.root and self.source != "index":
            raise UserError(
                f"data.root: found '{self.root}', but data.source is {self.source} and only an index has a root; "
                f"leave it empty"
            )
        # Every other source gives colour images, so this needs no look at them.
        self.validate_channels(1 if self.source == "embedded" else 3)

    def validate_channels(self, channels: int) -> None:
        """Raise UserError if `mean` or `std` has not one value for each of the images' channels."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != channels:
                raise UserError(
                    f"data.{name}: found {len(values)} values, expected {channels}, one for each channel of the images"
                )


def require_exact_jitter(jitter: str) -> None:
    """Raise UserError if the torchvision loader, which is exact, can't compute this jitter."""
    if jitter != "exact":
        raise UserError(
            f"data.jitter: found {jitter}, but the torchvision loader is exact; "
            f"set data.jitter=exact, or data.loader to dali or memory"
        )
