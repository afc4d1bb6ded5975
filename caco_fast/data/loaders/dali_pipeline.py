"""Batches on their way through DALI: files are read ahead, and a file that DALI refuses does not stop the run.

Plain 8-bit JPEG and PNG files reach DALI as they are. Everything else that PIL decodes (CMYK, 16 bits, palettes, GIF,
WebP, TIFF) is decoded by PIL here and passed on as bare pixels, a PNM file, so that every kind of file looks the same
to every loader. PIL also judges a JPEG that has no end, because other decoders accept it without a warning.

Legend: B images of one batch, h x w pixels, ch channels.
"""

import io
import struct
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.loaders.dali_graph import DEPTH, DaliGraph
from caco_fast.data.sources.base import MAX_PIXELS, BadImageError, Source, decode

# Threads that wait for files; they take hardly any processor time.
_READERS = 16

_PNG = b"\x89PNG\r\n\x1a\n"
# Bytes of metadata that can't be compressed from more than PIL takes.
_MOST_METADATA = 64 * 1024
# Baseline, extended and progressive, all of them Huffman-coded. The others are rare, and GPUs don't decode them.
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_START_OF_SCAN, _ADOBE = 0xDA, 0xEE
_END_OF_IMAGE = b"\xff\xd9"


class Encoded(NamedTuple):
    """An image file for a decoder, with the size that its header states."""

    data: np.ndarray  # [bytes] uint8
    height: int
    width: int


@dataclass
class PipelineBatch:
    """A batch that is being read or decoded; it keeps its files until its pixels are there."""

    held: np.ndarray  # [B] int64: positions as read
    files: list[Encoded] = field(default_factory=list, kw_only=True)  # B, once they are read


F = TypeVar("F", bound=PipelineBatch)


class DaliPipeline(ABC, Generic[F]):
    """Keeps `prefetch` batches of files read and `DEPTH` batches in a graph, and finds the files that DALI refuses.

    A subclass decides what happens to a batch that has bad images, and what the graph computes.
    """

    def __init__(self, source: Source, *, threads: int, prefetch: int, device: torch.device) -> None:
        self._source, self._prefetch = source, prefetch
        self._max_pixels = getattr(source, "max_pixels", MAX_PIXELS)
        self._threads = max(1, threads)
        self._device = device
        if device.type == "cuda" and device.index is None:
            # Each thread has a current device of its own, so the device needs its number.
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device) if device.type == "cuda" else None
        # Positions that PIL decodes and DALI doesn't.
        self._refused: set[int] = set()
        self._graph: DaliGraph | None = None
        self._readers: ThreadPoolExecutor | None = ThreadPoolExecutor(_READERS, "caco_fast reader")

    @abstractmethod
    def _new_graph(self) -> DaliGraph:
        """A graph that takes the batches of this pipeline."""

    @abstractmethod
    def _feed(self, graph: DaliGraph, batch: F) -> None:
        """Feed a batch of one image or more to the graph."""

    @abstractmethod
    def _replace_bad(self, batch: F, bad: dict[int, BadImageError]) -> None:
        """Complete a batch whose files were just read or changed: replace or drop the rows in `bad`."""

    def _stop(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._readers = self._graph = None

    def _run(self, planned: Iterator[F]) -> Iterator[tuple[F, list[Tensor]]]:
        """Each batch, in order, with the output of the graph for it."""
        reading: deque[tuple[F, list[Future[Encoded | BadImageError]]]] = deque()
        decoding: deque[F] = deque()
        try:
            while True:
                while len(reading) < self._prefetch and (batch := next(planned, None)) is not None:
                    reading.append((batch, [self._readers.submit(self._read, position) for position in batch.held]))
                while reading and len(decoding) < DEPTH:
                    batch, files = reading.popleft()
                    batch.files = [file.result() for file in files]
                    bad = {row: file for row, file in enumerate(batch.files) if isinstance(file, BadImageError)}
                    self._replace_bad(batch, bad)
                    decoding.append(batch)
                    self._start_newest(decoding)
                if not decoding:
                    return
                pixels = self._collect_first(decoding)
                yield decoding.popleft(), pixels
        finally:
            if decoding:
                # The next run would take the batches that are left in this graph for its own.
                self._graph = None

    def _read(self, position: int) -> Encoded | BadImageError:
        try:
            data = self._source.encoded(int(position))
            return (through_pil if position in self._refused else prepare)(data, self._max_pixels)
        except BadImageError as error:
            return error

    def _start_newest(self, decoding: deque[F]) -> None:
        """Start the newest batch; the others are in the graph already, unless it is gone."""
        try:
            self._start(decoding if self._graph is None else [decoding[-1]])
        except (RuntimeError, IndexError) as error:
            self._restart(decoding, error)

    def _collect_first(self, decoding: deque[F]) -> list[Tensor]:
        """The output of the graph for the first batch; an empty list if no image of it is left."""
        while decoding[0].files:
            try:
                with torch.cuda.stream(self._stream):
                    return self._graph.collect()
            except RuntimeError as error:
                self._restart(decoding, error)
        return []

    def _start(self, batches: Sequence[F]) -> None:
        for batch in batches:
            if batch.files:
                self._graph = self._graph or self._new_graph()
                self._feed(self._graph, batch)

    def _restart(self, decoding: deque[F], error: Exception) -> None:
        """Start the batches again, in a new graph and without the files that broke the last graph.

        DALI doesn't say which files those are, so every file is tried alone. A file that PIL decodes stays, decoded by
        PIL. Raises `error` if no file is the cause.
        """
        while True:
            self._graph = None
            if not any([self._drop_refused(batch) for batch in decoding]):
                raise error
            try:
                return self._start(decoding)
            except (RuntimeError, IndexError) as another:
                error = another

    def _drop_refused(self, batch: F) -> bool:
        """Whether DALI refused any of the files. Afterwards each of those is bad, or decoded by PIL."""
        graph, found, bad = None, False, {}
        for row, file in enumerate(batch.files):
            graph = graph or DaliGraph([], self._source.channels, 1, threads=1, device=self._device, crops=False)
            try:
                graph.feed([file.data])
                graph.collect()
            except RuntimeError:
                graph, found = None, True
                self._refused.add(int(batch.held[row]))
                try:
                    batch.files[row] = through_pil(file.data.tobytes(), self._max_pixels)
                except BadImageError as error:
                    bad[row] = error
        if found:
            self._replace_bad(batch, bad)
        return found


def prepare(data: bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """The image of a file's bytes; BadImageError if it is too large or PIL can't decode it."""
    size = _plain_jpeg(data) or _plain_png(data)
    # `decode` says what is wrong with an image that is too large.
    if size is None or size[0] * size[1] > max_pixels:
        return through_pil(data, max_pixels)
    return Encoded(np.frombuffer(data, dtype=np.uint8), *size)


def through_pil(data: bytes, max_pixels: int = MAX_PIXELS) -> Encoded:
    """The same image decoded by PIL, as a PNM file; BadImageError if PIL can't decode it."""
    image = decode(io.BytesIO(data), max_pixels)
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return Encoded(np.frombuffer(header + image.tobytes(), dtype=np.uint8), image.height, image.width)


def _plain_png(data: bytes) -> tuple[int, int] | None:
    """Height and width of a grey or RGB PNG of 8 bits; None for anything else."""
    if len(data) < 33 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    plain = depth == 8 and colour in (0, 2) and width and height
    return (height, width) if plain and _plain_chunks(data) else None


def _plain_chunks(data: bytes) -> bool:
    """Whether the metadata of a PNG are few and undamaged. libpng skips what is damaged there, PIL refuses the file."""
    position, metadata, pixels = len(_PNG), 0, False
    while position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if kind == b"IDAT":
            pixels = True
        elif kind != b"IEND":
            metadata += length
            # PIL looks at no checksum behind the pixels.
            damaged = not pixels and zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(
                data[end - 4 : end], "big"
            )
            if metadata > _MOST_METADATA or damaged:
                return False
        position = end
    return True


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a complete grey or YCbCr JPEG of 8 bits; None for anything else."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size = None
    position, end = 2, len(data) - 4
    while position < end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:
            # A fill byte.
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker in _FRAMES:
            if marker not in _PLAIN_FRAMES or len(segment) < 6:
                return None
            depth, height, width, components = struct.unpack(">BHHB", segment[:6])
            if depth != 8 or components not in (1, 3) or not height or not width:
                return None
            size = height, width
        elif marker == _ADOBE and segment.startswith(b"Adobe") and segment[11:12] != b"\x01":
            # Its three components may be RGB, for which not every decoder looks.
            return None
        elif marker == _START_OF_SCAN:
            return size if data.rfind(_END_OF_IMAGE, position) >= 0 else None
        position += 2 + length
    return None
