"""A t-SNE picture of test features (paper Fig. 5; van der Maaten and Hinton, JMLR 2008), and how far it keeps classes.

Legend: M test images of all ranks, P points, D feature size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from caco_fast.distributed import all_gather_uneven
from caco_fast.engine.agreement import on_rank_0
from caco_fast.errors import UserError
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.images import evenly_spaced
from caco_fast.settings import require_at_least, setting
from caco_fast.storage import atomic_write

# Components that t-SNE starts from; more of them cost time and change the picture little.
COMPONENTS = 50
# Points of a picture that are asked whether their neighbours have their class.
NEAREST = 10
# More colours can't be told apart.
MOST_CLASSES = 20
FEWEST = 30


@dataclass(frozen=True)
class TsneConfig:
    points: int = setting(2000, "test images in the picture, evenly spaced over the set; 5,000 take a minute")
    perplexity: float = setting(30.0, "perplexity of the neighbourhoods, less than a third of the points")
    classes: int = setting(10, "classes in the picture, the first ones of the set; at most 20")

    def __post_init__(self) -> None:
        require_at_least("tsne.points", self.points, FEWEST)
        if not 1 <= self.classes <= MOST_CLASSES:
            raise UserError(f"tsne.classes: found {self.classes}, expected 1 to {MOST_CLASSES}")
        if not 1 <= self.perplexity < self.points / 3:
            raise UserError(f"tsne.perplexity: found {self.perplexity:g}, expected 1 to {self.points / 3:.0f}")


@register("tsne", TsneConfig, "a picture of the features in two dimensions")
def tsne(context: Context, settings: TsneConfig) -> Result:
    test = context.features("test")
    own = (test.labels >= 0) & (test.labels < settings.classes)
    rows, labels = (all_gather_uneven(value[own]) for value in (test.features, test.labels))
    chosen = evenly_spaced(len(rows), settings.points)
    rows, labels = rows[chosen].float(), labels[chosen]
    if len(rows) < max(FEWEST, 3 * settings.perplexity):
        raise UserError(
            f"tsne.points: found {len(rows)} test images of {settings.classes} classes, expected at least "
            f"{max(FEWEST, 3 * settings.perplexity):.0f}; lower tsne.perplexity or raise tsne.classes"
        )
    path = context.folder / "tsne.png"
    title = f"{context.pretrained.title}: t-SNE of {len(rows):,} test images"

    def draw() -> float:
        points = embed(rows, settings.perplexity, context.seed)
        _draw(points, labels, test.source.classes, title, path)
        return kept(points, labels)

    share = on_rank_0(draw)
    return Result({f"same_class_of_{NEAREST}": share}, files=[path.name])


def embed(rows: Tensor, perplexity: float, seed: int, steps: int = 1000) -> Tensor:  # [P, D] -> [P, 2]
    """The points of a t-SNE picture after some steps of its descent. UserError if scikit-learn is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError(
            'tsne: scikit-learn is not installed; install it with: pip install "caco-fast[evaluate]"'
        ) from None
    centred = rows - rows.mean(0)
    if rows.shape[1] > COMPONENTS:
        # By the smaller of the two Gram matrices' eigenvectors, so that the result is the same on every run.
        _, vectors = torch.linalg.eigh(centred.T.double() @ centred.double())
        centred = (centred.double() @ vectors[:, -COMPONENTS:]).float()
    made = TSNE(init="pca", perplexity=perplexity, max_iter=steps, random_state=seed).fit_transform(centred.numpy())
    return torch.from_numpy(made)


def kept(points: Tensor, labels: Tensor) -> float:  # [P, 2], [P]
    """Per cent of the nearest points of each point that have its class."""
    distance = torch.cdist(points.double(), points.double()).fill_diagonal_(float("inf"))
    near = distance.topk(min(NEAREST, len(points) - 1), dim=1, largest=False).indices
    return 100.0 * (labels[near] == labels.unsqueeze(1)).double().mean().item()


def _draw(points: Tensor, labels: Tensor, classes: list[str], title: str, path: Path) -> None:
    # Here, because matplotlib takes a second to import.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    present = labels.unique().tolist()
    colours = colormaps["tab10" if len(present) <= 10 else "tab20"]
    for number, label in enumerate(present):
        x, y = points[labels == label].T
        name = classes[label] if classes else str(label)
        axes.scatter(x, y, s=7, color=colours(number), label=name, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[], aspect="equal")
    figure.legend(loc="outside right center", markerscale=3, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
