#!/usr/bin/env python3
"""Cut a corpus of JPEGs with ImageNet's statistics out of photographs, to measure decoding and loading on.

    python tools/make/jpeg_corpus.py data/corpus --photos ~/Pictures
    python tools/make/jpeg_corpus.py data/corpus                        # photographs of Debian's wallpaper packages

The corpus resembles ImageNet in what costs a decoder time: image sizes and their mixture, bits per pixel, chroma
subsampling, texture. Crops have the sizes of ImageNet's common formats and are compressed to a number of bits per pixel
that is drawn from a lognormal distribution. Each photograph is a class. corpus.json records the result and its origin.
The photographs belong to other people, so do not commit the corpus or pass it on.

Legend: N images of the corpus, P photographs.
"""

import argparse
import io
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from caco_fast.data.sources.base import BadImageError, decode
from caco_fast.errors import UserError

PACKAGES = (
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "lxqt-themes",
    "ukui-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "hugin-data",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")

# Width and height of crops, and how often: ImageNet's common formats.
SHAPES = {
    (500, 375): 40,
    (375, 500): 12,
    (500, 333): 15,
    (333, 500): 6,
    (500, 500): 5,
    (640, 480): 6,
    (400, 300): 8,
    (1024, 768): 3,
    (250, 188): 5,
}
BITS_PER_PIXEL, SPREAD, LEAST_BITS, MOST_BITS = 4.2, 0.45, 1.0, 12.0  # median and sigma of the lognormal, its ends
SUBSAMPLED = 0.7  # share of 4:2:0, the rest being 4:4:4
LONGEST = 3000  # pixels of a photograph's longer side; larger ones are reduced first
LEAST_SIDE = 600
MOST_ALIKE = 4  # bits of 64 in which the likenesses of two photographs may differ to count as one
VAL_SHARE = 0.1

console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    output = options.output.expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; remove it, or name another place")
    # Made next to its place and then moved there, so that a folder of this name is always complete.
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}_")
    except OSError as error:
        raise UserError(f"can't write in {output.parent}: {error.strerror}") from error
    with scratch as folder:
        photos, origin = Path(folder, "photos"), [str(options.photos)]
        if options.photos is None:
            photos.mkdir()
            origin = fetch_packages(photos)
        else:
            photos = options.photos.expanduser()
        made = Path(folder, "corpus")
        record = write_corpus(find_photos(photos), made, options.images, options.seed)
        record = {"photographs_from": origin, "seed": options.seed, **record}
        (made / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")
        made.chmod(0o755)
        if output.exists():
            output.rmdir()
        made.replace(output)
    console.print(
        f"{record['images']:,} images of {record['photographs']} photographs in {output}: "
        f"{record['mean_bytes'] / 1000:.0f} KB, {record['mean_width']:.0f} x {record['mean_height']:.0f} pixels, "
        f"{record['bits_per_pixel']:.2f} bits a pixel on average (ImageNet: about 110 KB, 472 x 405)"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to make: train/<photograph>/*.JPEG and val/")
    parser.add_argument(
        "--photos", type=Path, metavar="DIR", help="folder of your own photographs; default: Debian packages"
    )
    parser.add_argument("--images", type=int, default=2000, help="N, images to cut (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")
    options = parser.parse_args(arguments)
    if options.images < 20:
        parser.error(f"--images: found {options.images}, expected 20 or more")
    return options


def fetch_packages(folder: Path) -> list[str]:
    """Unpack the wallpaper packages into folders there, without installing them; returns their names and versions."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not here, so Debian's photographs can't be fetched; give --photos DIR")
    got, failures = [], []
    for package in PACKAGES:
        console.print(f"fetching {package} ...")
        done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        archive = next(folder.glob("*.deb"), None)
        if done.returncode or archive is None:
            lines = (done.stderr or done.stdout).strip().splitlines()
            failures.append(f"{package}: {lines[-1] if lines else done.returncode}")
            continue
        unpacked = subprocess.run(["dpkg", "-x", archive.name, package], cwd=folder, capture_output=True, text=True)
        if unpacked.returncode:
            failures.append(f"{package}: {unpacked.stderr.strip()}")
        else:
            got.append(archive.stem)
        archive.unlink()
    for failure in failures:
        console.print(f"left out {failure}", markup=False)
    if not got:
        raise UserError(f"none of {len(PACKAGES)} packages could be fetched ({failures[0]}); give --photos DIR")
    return got


def find_photos(folder: Path) -> list[Path]:
    """Image files below a folder, sorted. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"--photos: {folder} is no directory")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_symlink())
    if not found:
        raise UserError(f"no image files in {folder}, expected {', '.join(SUFFIXES)}")
    return found


def write_corpus(paths: Sequence[Path], output: Path, images: int, seed: int) -> dict[str, object]:
    """Cut `images` crops out of the photographs among `paths`, evenly over all; returns the record of the corpus."""
    chance = random.Random(seed)
    photos = list(_photographs(track(paths, "choosing photographs", console=console, transient=True)))
    if not photos:
        raise UserError(
            f"none of {len(paths)} images is a photograph of at least {LEAST_SIDE} pixels each way, opaque and textured"
        )
    sizes: list[tuple[int, int, int]] = []  # bytes, width, height
    for number, path in enumerate(track(photos, "cutting", console=console, transient=True)):
        # The later photographs make up for one that gives too few crops.
        share = math.ceil((images - len(sizes)) / (len(photos) - number))
        photo = _reduced(decode(path))
        for image in _crops(photo, share, chance):
            data = _compressed(image, chance)
            split = "val" if len(sizes) % round(1 / VAL_SHARE) == 0 else "train"
            place = output / split / f"{number:04}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{len(sizes):06}.JPEG").write_bytes(data)
            sizes.append((len(data), *image.size))
    # The classes of val/ must be classes of train/.
    for folder in (output / "val").iterdir():
        (output / "train" / folder.name).mkdir(parents=True, exist_ok=True)
    lengths, widths, heights = np.array(sizes, dtype=np.float64).T  # each [N]
    return {
        "images": len(sizes),
        "photographs": len(photos),
        "mean_bytes": round(lengths.mean()),
        "p10_p50_p90_bytes": np.percentile(lengths, (10, 50, 90)).round().tolist(),
        "mean_width": round(widths.mean(), 1),
        "mean_height": round(heights.mean(), 1),
        "bits_per_pixel": round(8 * lengths.sum() / (widths * heights).sum(), 3),
    }


def _photographs(paths: Iterator[Path]) -> Iterator[Path]:
    """The paths of photographs: large, opaque, colourful and textured images, without near copies of others."""
    seen: list[int] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if min(image.size) < LEAST_SIDE:
                    continue
                has_alpha = "A" in image.getbands() or "transparency" in image.info
                small = image.convert("RGBA" if has_alpha else "RGB").resize((64, 64), Image.Resampling.BOX)
                grey = image.convert("L").resize((500, 375), Image.Resampling.BOX)
            decode(path)
        except (BadImageError, OSError, ValueError, Image.DecompressionBombError):
            continue
        pixels = np.asarray(small)  # [64, 64, 3 or 4]
        transparent = pixels.shape[2] == 4 and (pixels[..., 3] < 128).mean() > 0.05
        colours = len(np.unique(pixels[..., :3].reshape(-1, 3) // 8, axis=0))
        detail = np.abs(np.diff(np.asarray(grey, dtype=np.float32), axis=1)).mean()
        # Whether each pixel of a 9 x 8 thumbnail is darker than the next: the same for one picture in many sizes.
        thumbnail = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(int)
        likeness = int.from_bytes(np.packbits(thumbnail[:, 1:] > thumbnail[:, :-1]).tobytes(), "big")
        like_another = any((likeness ^ other).bit_count() <= MOST_ALIKE for other in seen)
        if not transparent and colours >= 250 and detail > 3 and not like_another:
            seen.append(likeness)
            yield path


def _reduced(photo: Image.Image) -> Image.Image:
    longest = max(photo.size)
    if longest <= LONGEST:
        return photo
    return photo.resize([side * LONGEST // longest for side in photo.size], Image.Resampling.BOX)


def _crops(photo: Image.Image, count: int, chance: random.Random) -> Iterator[Image.Image]:
    """Up to `count` crops of drawn format, scale (to a fifth) and place; flat ones, as of sky, are left out."""
    made = 0
    for _ in range(4 * count):
        if made == count:
            return
        ((width, height),) = chance.choices(list(SHAPES), list(SHAPES.values()))
        most = min(photo.width / width, photo.height / height)
        if most < 1:
            continue
        factor = math.exp(chance.uniform(0, math.log(min(most, 5.0))))
        left = chance.randint(0, photo.width - int(width * factor))
        top = chance.randint(0, photo.height - int(height * factor))
        box = (left, top, left + int(width * factor), top + int(height * factor))
        image = photo.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=2)
        if np.asarray(image.resize((32, 32), Image.Resampling.BOX)).std() >= 10:
            made += 1
            yield image


def _compressed(image: Image.Image, chance: random.Random) -> bytes:
    """The image as JPEG, with the quality that comes nearest to a drawn number of bits per pixel."""
    subsampling = "4:2:0" if chance.random() < SUBSAMPLED else "4:4:4"
    bits = min(MOST_BITS, max(LEAST_BITS, chance.lognormvariate(math.log(BITS_PER_PIXEL), SPREAD)))
    target = bits * image.width * image.height / 8
    best = b""
    for quality in (72, 85, 92, 96, 98, 99):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling=subsampling)
        data = file.getvalue()
        if not best or abs(len(data) - target) < abs(len(best) - target):
            best = data
        if len(data) > target:
            break
    return best


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; no corpus was made", file=sys.stderr)
        sys.exit(130)
