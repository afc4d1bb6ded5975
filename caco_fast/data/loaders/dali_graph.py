"""Decoding and cropping with NVIDIA DALI: one graph, on a GPU or on the CPU.

On the CPU the graph ends with the decoded images, and `crop_views` cuts and resizes them: torch's uint8 resize is
several times faster than DALI's there, and within one level of PIL's instead of seven.

The graph is a pure function of its input: encoded files, and a box for each view. So it has no state that a resumed run
would need, and another graph can replace one that broke.

Legend: B images, V views of an image, ch channels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor
from torch.nn.functional import interpolate

from caco_fast.data.views.pil import evaluation_box

# Batches that DALI works on at a time.
DEPTH = 2


class DaliGraph:
    """Decodes each image once and cuts all its views; up to `DEPTH` batches may be fed before one is collected."""

    def __init__(
        self,
        sizes: Sequence[int],
        channels: int,
        batch_size: int,
        *,
        threads: int,
        device: torch.device,
        crops: bool | None = None,
    ) -> None:
        """`sizes` [V]: side of each view in pixels; `threads` of the CPU work for it.

        `crops`: whether the graph cuts and resizes, or gives whole images; None: on a GPU it does.
        """
        gpu = device.type == "cuda"
        self.sizes, self.channels, self.device = list(sizes), channels, device
        self.crops = gpu if crops is None else crops
        self._pipe = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index if device.index is not None else torch.cuda.current_device()) if gpu else None,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,
            exec_pipelined=False,
            seed=0,
        )
        with self._pipe:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
            image = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB if channels == 3 else types.GRAY,
                adjust_orientation=False,
            )
            self._pipe.set_outputs(*self._outputs(image))
        self._pipe.build()

    def _outputs(self, image: object) -> list[object]:
        return [_crop(image, view) for view in range(len(self.sizes))] if self.crops else [image]

    def feed(
        self, files: Sequence[np.ndarray], boxes: Sequence[np.ndarray] = (), flips: Sequence[np.ndarray] = ()
    ) -> None:
        """Start a batch: B files, each [bytes] uint8; for each view boxes [B, 4] in pixels and flips [B] bool."""
        self._pipe.feed_input("encoded", list(files))
        for view, (box, flip, size) in enumerate(zip(boxes, flips, self.sizes) if self.crops else ()):
            # A negative extent mirrors.
            extent = np.stack([np.full(len(flip), size), np.where(flip, -size, size)], axis=1)
            self._pipe.feed_input(f"start{view}", np.ascontiguousarray(box[:, :2], dtype=np.int32))
            self._pipe.feed_input(f"shape{view}", np.ascontiguousarray(box[:, 2:], dtype=np.int32))
            self._pipe.feed_input(f"extent{view}", extent.astype(np.float32))
        self._pipe.schedule_run()

    def collect(self) -> list[Tensor]:
        """The crops of the batch that was fed first, V tensors [B, s, s, ch] uint8 on the device; or its B images.

        Raises:
            RuntimeError: DALI failed, most likely because of one of the files; the graph can't be used any more.
        """
        outputs = self._pipe.share_outputs()
        tensors = [self._tensor(part) for part in (map(_whole, outputs) if self.crops else outputs[0])]
        self._pipe.release_outputs()
        return tensors

    def _tensor(self, source: object) -> Tensor:
        if self.device.type == "cpu":
            # The dynamic executor keeps a buffer alive for its holders, even after the release.
            return torch.from_dlpack(source)
        tensor = torch.empty(source.shape(), dtype=torch.uint8, device=self.device)
        return feed_ndarray(source, tensor, cuda_stream=torch.cuda.current_stream(self.device))


class EvaluationGraph(DaliGraph):
    """Decodes images, resizes them whole and cuts the same size out of each, as evaluation does.

    The sizes are part of the input, because DALI rounds the longer side and torchvision cuts its fraction off.
    """

    def __init__(
        self,
        resize: int | None,
        size: int | None,
        channels: int,
        batch_size: int,
        *,
        threads: int,
        device: torch.device,
    ) -> None:
        """`resize`, `size`: see `evaluation_transform`. Without a `size` there are B images, each of its own size."""
        self._resize, self._size = resize, size
        sizes = [size] if size else []
        super().__init__(sizes, channels, batch_size, threads=threads, device=device, crops=size is not None)

    def _outputs(self, image: object) -> list[object]:
        if self._resize:
            shape = fn.external_source(name="resized", ndim=1, dtype=types.FLOAT)
            image = fn.resize(image, size=shape, interp_type=types.INTERP_TRIANGULAR, antialias=True)
        if self._size:
            start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
            box = {"start": start, "shape": [self._size, self._size], "axes": [0, 1]}
            image = fn.slice(image, **box, out_of_bounds_policy="pad", fill_values=0)
        return [image]

    def feed_evaluation(self, files: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> None:
        """Start a batch: B files, each [bytes] uint8, of images of `sizes`, each (height, width) in pixels."""
        resized, starts = zip(*(evaluation_box(*size, self._resize, self._size) for size in sizes))
        self._pipe.feed_input("encoded", list(files))
        if self._resize:
            self._pipe.feed_input("resized", np.array(resized, dtype=np.float32))
        if self._size:
            self._pipe.feed_input("start", np.array(starts, dtype=np.int32))
        self._pipe.schedule_run()


def crop_views(images: Sequence[Tensor], boxes: np.ndarray, flips: np.ndarray, size: int) -> Tensor:
    """Boxes [B, 4] of B images [h, w, ch] uint8 on the CPU, resized as PIL does and flipped.

    The result is [B, size, size, ch] uint8; its memory has the channels apart, as the resize leaves them.
    """
    crops = []
    for image, (top, left, height, width), flip in zip(images, boxes.tolist(), flips.tolist()):
        # Contiguous, because the resize would otherwise copy it value by value.
        cut = image[top : top + height, left : left + width].contiguous().permute(2, 0, 1)[None]
        crop = interpolate(cut, size=(size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if flip else crop)
    return torch.cat(crops).permute(0, 2, 3, 1)


def _whole(crops: object) -> object:
    """All crops, which have one size, as a single tensor."""
    return crops.as_tensor()


def _crop(image: object, view: int) -> object:
    """The crop of one view, cut first and then resized as PIL does.

    With a region of interest the filter would see the pixels around the box.
    """
    start = fn.external_source(name=f"start{view}", ndim=1, dtype=types.INT32)
    shape = fn.external_source(name=f"shape{view}", ndim=1, dtype=types.INT32)
    extent = fn.external_source(name=f"extent{view}", ndim=1, dtype=types.FLOAT)
    cut = fn.slice(image, start=start, shape=shape, axes=[0, 1])
    return fn.resize(cut, size=extent, interp_type=types.INTERP_TRIANGULAR, antialias=True)
