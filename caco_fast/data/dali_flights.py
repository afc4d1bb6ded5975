"""Batches on their way through DALI, for training and evaluation: files read ahead, and none that stops the run.

Legend: B images of one batch, h x w pixels, ch channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.dali_graph import DEPTH, DaliGraph
from caco_fast.data.encoded import Encoded, prepare, through_pil
from caco_fast.data.source import BadImageError, Source

# Threads that wait for files; they take no processor time to speak of.
_READERS = 16


@dataclass
class Flight:
    """A batch on its way; it keeps its files until it has arrived."""

    held: np.ndarray  # [B] int64: positions as read
    files: list[Encoded] = field(default_factory=list, kw_only=True)  # B, once they are read


F = TypeVar("F", bound=Flight)


class DaliFlights(ABC, Generic[F]):
    """Keeps `prefetch` batches of files read and `DEPTH` batches in a graph, and sorts out the files that it refuses.

    What becomes of a batch that has bad images, and what the graph makes of one, is left to the class that takes this
    as its base.
    """

    def __init__(self, source: Source, *, threads: int, prefetch: int, device: torch.device | str) -> None:
        self._source, self._prefetch = source, prefetch
        self._threads = max(1, threads)
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            # Threads have no current device of their own choice.
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # Positions that PIL decodes and DALI doesn't.
        self._refused: set[int] = set()
        self._graph: DaliGraph | None = None
        self._readers: ThreadPoolExecutor | None = ThreadPoolExecutor(_READERS, "caco_fast reader")

    @abstractmethod
    def _new_graph(self) -> DaliGraph: ...

    @abstractmethod
    def _board(self, graph: DaliGraph, flight: F) -> None:
        """Feeds a batch of one image or more to the graph."""

    @abstractmethod
    def _settle(self, flight: F, bad: dict[int, BadImageError]) -> None:
        """Readies a batch whose files are new or others, without the images of the rows in `bad`."""

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._readers = self._graph = None

    def _flown(self, planned: Iterator[F]) -> Iterator[tuple[F, list[Tensor]]]:
        """Each batch, in order, with what the graph made of it."""
        reading: deque[tuple[F, list[Future[Encoded | BadImageError]]]] = deque()
        flying: deque[F] = deque()
        try:
            while True:
                while len(reading) < self._prefetch and (flight := next(planned, None)) is not None:
                    reading.append((flight, [self._readers.submit(self._read, position) for position in flight.held]))
                while reading and len(flying) < DEPTH:
                    flight, files = reading.popleft()
                    flight.files = [file.result() for file in files]
                    bad = {row: file for row, file in enumerate(flight.files) if isinstance(file, BadImageError)}
                    self._settle(flight, bad)
                    flying.append(flight)
                    self._feed(flying)
                if not flying:
                    return
                pixels = self._collect(flying)
                yield flying.popleft(), pixels
        finally:
            if flying:
                # What is in the graph would be taken for the next batches'.
                self._graph = None

    def _read(self, position: int) -> Encoded | BadImageError:
        try:
            data = self._source.encoded(int(position))
            return through_pil(data) if position in self._refused else prepare(data)
        except BadImageError as error:
            return error

    def _feed(self, flying: deque[F]) -> None:
        """Starts the newest batch, the others being under way."""
        try:
            self._start(flying if self._graph is None else [flying[-1]])
        except (RuntimeError, IndexError) as error:
            self._repair(flying, error)

    def _collect(self, flying: deque[F]) -> list[Tensor]:
        """What the graph made of the first batch; nothing where no image of it is left."""
        while flying[0].files:
            try:
                with torch.cuda.stream(self._stream):
                    return self._graph.collect()
            except RuntimeError as error:
                self._repair(flying, error)
        return []

    def _start(self, flights: Sequence[F]) -> None:
        for flight in flights:
            if flight.files:
                self._graph = self._graph or self._new_graph()
                self._board(self._graph, flight)

    def _repair(self, flying: deque[F], error: Exception) -> None:
        """Starts the batches again, in another graph and without the files that broke the last one.

        DALI doesn't say which those are, so every file is tried by itself. One that PIL decodes stays, decoded by PIL.
        Raises `error` where no file is to blame.
        """
        while True:
            self._graph = None
            if not any([self._without_refused(flight) for flight in flying]):
                raise error
            try:
                return self._start(flying)
            except (RuntimeError, IndexError) as another:
                error = another

    def _without_refused(self, flight: F) -> bool:
        """Whether DALI refused any of the files, all of which are bad, or decoded by PIL, afterwards."""
        graph, found, bad = None, False, {}
        for row, file in enumerate(flight.files):
            graph = graph or DaliGraph([], self._source.channels, 1, threads=1, device=self._device, crops=False)
            try:
                graph.feed([file.data])
                graph.collect()
            except RuntimeError:
                graph, found = None, True
                self._refused.add(int(flight.held[row]))
                try:
                    flight.files[row] = through_pil(file.data.tobytes())
                except BadImageError as error:
                    bad[row] = error
        if found:
            self._settle(flight, bad)
        return found
