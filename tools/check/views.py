#!/usr/bin/env python3
"""Differences of the DALI loader's views from torchvision's, on the same parameters: a table and a page.

    python tools/check/views.py --images DIR                 # writes runs/views/index.html, views.png
    python tools/check/views.py --images DIR --output benchmarks/results/dali_parity_cpu.json
    python tools/check/views.py --table benchmarks/results/dali_parity_cpu.json

DIR holds photographs as JPEG files; tools/make/jpeg_corpus.py makes such a folder. Differences are in grey levels
(of 256), over all pixels and images, for each operation alone and for the whole view of the published recipe.
torchvision works on PIL images, with 256 levels after every operation.

Legend: N images, s x s pixels of a view.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from caco_fast.benchmarking import read_result, write_result
from caco_fast.data.config import ViewConfig
from caco_fast.data.loaders.dali_pipeline import Encoded, prepare
from caco_fast.data.views.batched import finish_crops
from caco_fast.data.views.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, draw_views
from caco_fast.errors import UserError

JITTER = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
VIEW_A, VIEW_B = ViewConfig(blur_p=1.0), ViewConfig(blur_p=0.1, solarize_p=0.2)
SMALL = ViewConfig(size=96, scale=(0.05, 0.14))
# Boxes drawn for the distributions, from an image of ImageNet's commonest size.
BOXES, HEIGHT, WIDTH = 20_000, 375, 500


@dataclass(frozen=True)
class Row:
    """One line of the table, with the operations that are switched on."""

    name: str
    config: ViewConfig
    draws: ViewDraws
    jitter: str = "exact"
    by_dali: bool = False  # resized by DALI, as on a GPU, and not by torch


def neutral(draws: ViewDraws, **changes: np.ndarray) -> ViewDraws:
    """The draws with everything but the crop switched off, except for `changes`."""
    rows = len(draws.flip)
    off = np.zeros(rows, dtype=bool)
    plain = dict(order=np.empty((rows, 0), dtype=np.int64), factors=np.tile([1.0, 1, 1, 0], (rows, 1)))
    return replace(draws, **(plain | dict(grey=off, sigma=np.zeros(rows), solarize=off, flip=off) | changes))


def rows_of(files: list[Encoded]) -> list[Row]:
    """The lines of the table: each operation with its published parameters, drawn for every image; then whole views."""
    count = len(files)
    size = np.array([(file.height, file.width) for file in files]).T

    def drawn(config: ViewConfig, view: int) -> ViewDraws:
        index = np.arange(count)
        return draw_views(config, *size, 3, seed=0, epoch=0, index=index, view=np.full(count, view))

    # Every view has all operations, so that each can be compared alone.
    config = replace(VIEW_A, jitter_p=1.0)
    draws = drawn(config, 0)
    on = np.ones(count, dtype=bool)
    rows = [
        Row("decode, crop, resize", config, neutral(draws)),
        Row("the same by DALI alone, as on a GPU", config, neutral(draws), by_dali=True),
        Row("flip", config, neutral(draws, flip=on)),
    ]
    for operation, name in enumerate(("brightness", "contrast about the mean grey", "saturation", "hue in HSV")):
        factors = np.tile([1.0, 1, 1, 0], (count, 1))
        factors[:, operation] = draws.factors[:, operation]
        only = neutral(draws, order=np.full((count, 1), operation), factors=factors)
        rows.append(Row(name, config, only))
    jittered = neutral(draws, order=draws.order, factors=draws.factors)
    rows += [
        Row("jitter, exact: all four, in random order", config, jittered),
        Row("jitter, fast", config, jittered, "fast"),
        Row("grey", config, neutral(draws, grey=on)),
        Row("blur", config, neutral(draws, sigma=draws.sigma)),
        Row("solarise", config, neutral(draws, solarize=on)),
    ]
    for number, (name, whole) in enumerate((("view a", VIEW_A), ("view b", VIEW_B), ("small crop of 96", SMALL))):
        for jitter in ("exact", "fast"):
            rows.append(Row(f"{name}, {jitter}", whole, drawn(whole, number), jitter))
    return rows


def by_loader(files: list[Encoded], row: Row) -> np.ndarray:
    """Views [N, s, s, 3] float32 in grey levels, as the DALI loader makes them."""
    # Here, so that --table works without DALI.
    from caco_fast.data.loaders.dali_graph import DaliGraph, crop_views

    size, device = row.config.size, torch.device("cpu")
    graph = DaliGraph([size], 3, len(files), threads=2, device=device, crops=row.by_dali)
    graph.feed([file.data for file in files], [row.draws.box], [row.draws.flip])
    outputs = graph.collect()
    crops = outputs[0] if row.by_dali else crop_views(outputs, row.draws.box, row.draws.flip, size)
    views = finish_crops(crops, row.draws, row.config, torch.zeros(3), torch.ones(3), row.jitter)
    return views.permute(0, 2, 3, 1).numpy() * 255


def by_torchvision(files: list[Path], row: Row) -> np.ndarray:
    """The same views, made with PIL and torchvision's functions."""
    views, draws = [], row.draws
    for number, file in enumerate(files):
        with Image.open(file) as image:
            picture = image.convert("RGB")
        picture = F.resized_crop(picture, *draws.box[number].tolist(), size=[row.config.size] * 2)
        for operation in draws.order[number].tolist():
            picture = JITTER[operation](picture, float(draws.factors[number, operation]))
        if draws.grey[number]:
            picture = F.to_grayscale(picture, num_output_channels=3)
        if draws.sigma[number]:
            picture = picture.filter(ImageFilter.GaussianBlur(float(draws.sigma[number])))
        if draws.solarize[number]:
            picture = F.solarize(picture, 128)
        if draws.flip[number]:
            picture = F.horizontal_flip(picture)
        views.append(np.asarray(picture, dtype=np.float32))
    return np.stack(views)


def compare(paths: list[Path]) -> tuple[list[dict[str, object]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A record for each row, and the whole views [N, s, s, 3] of both, torchvision's first, by the row's name."""
    files = [prepare(path.read_bytes()) for path in paths]
    records, shown = [], {}
    for row in rows_of(files):
        ours, theirs = by_loader(files, row), by_torchvision(paths, row)
        apart = np.abs(ours - theirs)
        records.append(
            {"operation": row.name, "mean": round(float(apart.mean()), 3), "max": round(float(apart.max()), 1)}
        )
        if row.name.startswith("view"):
            shown[row.name] = theirs, ours
    return records, shown


def boxes(config: ViewConfig) -> tuple[np.ndarray, np.ndarray]:
    """Crop boxes [BOXES, 4], ours and torchvision's."""
    index = np.arange(BOXES)
    ours = draw_views(config, HEIGHT, WIDTH, 3, seed=1, epoch=0, index=index, view=index).box
    crop = v2.RandomResizedCrop(config.size, scale=config.scale, ratio=config.ratio)
    torch.manual_seed(0)
    image = torch.empty(3, HEIGHT, WIDTH)
    drawn = [crop.make_params([image]) for _ in index]
    return ours, np.array([[box[name] for name in ("top", "left", "height", "width")] for box in drawn])


def same_distribution(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The Kolmogorov-Smirnov statistic of two samples of one size, and its p-value (Kolmogorov's series)."""
    points = np.union1d(left, right)
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (left, right)]
    statistic = float(np.abs(shares[0] - shares[1]).max())
    reduced, term = statistic * np.sqrt(len(left) / 2), np.arange(1, 101)
    p = float(2 * np.sum((-1.0) ** (term - 1) * np.exp(-2 * (term * reduced) ** 2)))
    return {"statistic": round(statistic, 4), "p": round(min(max(p, 0.0), 1.0), 3)}


def distributions() -> list[dict[str, object]]:
    """KS tests of the crops' area and aspect ratio, ours against torchvision's, for large and small crops."""
    found = []
    for name, config in (("224, scale 0.2 to 1", VIEW_A), ("96, scale 0.05 to 0.14", SMALL)):
        ours, theirs = boxes(config)
        for what, of in (("area", lambda b: b[:, 2] * b[:, 3]), ("aspect ratio", lambda b: b[:, 3] / b[:, 2])):
            found.append({"crop": name, "of": what, **same_distribution(of(ours), of(theirs))})
    return found


def table(record: dict) -> str:
    settings, results = record["settings"], record["results"]
    lines = ["| difference from torchvision, grey levels | mean | max |", "|---|--:|--:|"]
    lines += [f"| {row['operation']} | {row['mean']:.2f} | {row['max']:.0f} |" for row in results["parity"]]
    crops = "; ".join(
        f"{row['crop']}, {row['of']} {row['statistic']:.4f} (p {row['p']:.2f})" for row in results["crops"]
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{settings['images']} photographs, DALI {settings['dali']} on the CPU. Kolmogorov-Smirnov statistic of "
            f"{BOXES:,} crops each of a {WIDTH} x {HEIGHT} image against torchvision's: {crops}.",
        ]
    )


def contact_sheet(shown: dict[str, tuple[np.ndarray, np.ndarray]], count: int) -> Image.Image:
    """A row for each of `count` images; for each kind of view torchvision's, ours, and eight times their difference."""
    columns = []
    for theirs, ours in shown.values():
        # Spread over all of them: neighbours in a folder are often alike.
        rows = np.linspace(0, len(ours) - 1, count).astype(int)
        columns += [theirs[rows], ours[rows], 8 * np.abs(ours - theirs)[rows]]
    size = columns[0].shape[1]
    sheet = Image.new("RGB", (len(columns) * (size + 4), count * (size + 4)), "white")
    for column, views in enumerate(columns):
        for line, view in enumerate(views):
            pixels = Image.fromarray(view.round().clip(0, 255).astype(np.uint8))
            sheet.paste(pixels, (column * (size + 4), line * (size + 4)))
    return sheet


def page(record: dict, kinds: list[str]) -> str:
    rows = "".join(
        f"<tr><td>{row['operation']}</td><td>{row['mean']:.2f}</td><td>{row['max']:.0f}</td></tr>"
        for row in record["results"]["parity"]
    )
    crops = "".join(
        f"<tr><td>{row['crop']}</td><td>{row['of']}</td><td>{row['statistic']:.4f}</td><td>{row['p']:.2f}</td></tr>"
        for row in record["results"]["crops"]
    )
    columns = "".join(f"<th>{kind}: torchvision</th><th>ours</th><th>8 x the difference</th>" for kind in kinds)
    return f"""<!doctype html><meta charset="utf-8"><title>Views</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} td, th {{ padding: 2px 10px; text-align: left }}
.sheet th {{ width: 224px; padding: 0 2px; font-size: 13px }} img {{ display: block }}</style>
<h1>Views by the DALI loader and by torchvision, on the same parameters</h1>
<table><tr><th>difference in grey levels</th><th>mean</th><th>max</th></tr>{rows}</table>
<h2>Crops, Kolmogorov-Smirnov</h2>
<table><tr><th>crop</th><th>of</th><th>statistic</th><th>p</th></tr>{crops}</table>
<h2>Views</h2><table class="sheet" cellspacing="0"><tr>{columns}</tr></table><img src="views.png" alt="contact sheet">
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with photographs as .JPEG or .jpg, searched in depth")
    parser.add_argument("--count", type=int, default=64, help="how many of them, spread over the folder (default 64)")
    parser.add_argument("--page", type=Path, default=Path("runs/views"), help="folder of the page (default runs/views)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON too")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a result as Markdown and do nothing else")
    return parser.parse_args()


def photographs(folder: Path | None, count: int) -> list[Path]:
    if folder is None or not folder.is_dir():
        raise UserError(
            f"--images: found {folder}, expected a folder of photographs; tools/make/jpeg_corpus.py makes one"
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if count < 1 or not found:
        raise UserError(f"{folder} has {len(found)} .JPEG or .jpg files, --count is {count}; both must be 1 or more")
    return found[:: max(1, len(found) // count)][:count]


def main() -> int:
    options = parse()
    try:
        if options.table:
            print(table(read_result(options.table)))
            return 0
        paths = photographs(options.images, options.count)
        from nvidia.dali import __version__ as dali
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError:
        print('error: NVIDIA DALI is not installed: pip install "caco-fast[dali-cuda13]"', file=sys.stderr)
        return 2
    parity, shown = compare(paths)
    settings = {"images": len(paths), "dali": dali}
    results = {"parity": parity, "crops": distributions()}
    record = {"settings": settings, "results": results}
    options.page.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown, min(12, len(paths))).save(options.page / "views.png")
    (options.page / "index.html").write_text(page(record, list(shown)))
    if options.output:
        write_result(options.output, settings=settings, results=results)
    print(table(record))
    print(f"\nlook at {options.page / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
