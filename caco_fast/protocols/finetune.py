"""Fine-tuning of backbone and classifier with published settings: on all labels, and on few (low-shot)."""

import dataclasses
from typing import Any

from caco_fast.data import Source
from caco_fast.engine.agreement import together
from caco_fast.errors import UserError
from caco_fast.evaluate import linear_probe
from caco_fast.pretrained import Pretrained
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.few_labels import labelled_part
from caco_fast.protocols.fine_tuning import FinetuneRecipe, FineTuning
from caco_fast.protocols.images import crop_loader, labelled, view_deviations
from caco_fast.protocols.presets import choose, overridable, preset_names, preset_of
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import require_at_least, setting

FOLDER = "finetune"
SIZE = (int | None, setting(None, "side of the training crop in pixels; null: that of the test view"))
FinetuneConfig = overridable(FinetuneRecipe, "finetune", FOLDER, size=SIZE)
LowshotConfig = overridable(
    FinetuneRecipe,
    "lowshot",
    FOLDER,
    labels=(str, setting("", "file that lists the labelled images, one name a line, such as SimCLR's 1percent.txt")),
    per_class=(int | None, setting(None, "labelled images of each class, drawn by the seed")),
    share=(float | None, setting(None, "share of each class that is labelled, drawn by the seed; by default 0.01")),
    frozen=(bool, setting(True, "also fit logistic regression to the frozen features of the same labels")),
    size=SIZE,
)


@register("finetune", FinetuneConfig, "fine-tuning of the whole network on all labels")
def finetune(context: Context, settings: Any) -> Result:
    train, test = labelled(context, "finetune")
    return _tuned(context, settings, "finetune", train, test, len(train))


@register("lowshot", LowshotConfig, "fine-tuning on few labels, and logistic regression on them")
def lowshot(context: Context, settings: Any) -> Result:
    given = [name for name in ("labels", "per_class", "share") if getattr(settings, name) not in (None, "")]
    if len(given) > 1:
        raise UserError(f"lowshot: found {' and '.join(given)}, expected one of labels, per_class and share")
    if settings.per_class is not None:
        require_at_least("lowshot.per_class", settings.per_class, 1)
    share = 0.01 if settings.share is None else settings.share
    if not 0 < share <= 1:
        raise UserError(f"lowshot.share: found {share}, expected a number in (0, 1]")
    train, test = labelled(context, "lowshot")
    part = together(
        lambda: labelled_part(
            train,
            file=settings.labels,
            per_class=settings.per_class,
            share=share,
            seed=context.seed,
            name="lowshot",
        )
    )
    result = _tuned(context, settings, "lowshot", part, test, len(train))
    if settings.frozen:
        fitted, tested = context.features("train", source=part), context.features("test", source=test)
        result.metrics["top1_frozen_logistic_regression"] = linear_probe(
            *(fitted.features.to(context.device), fitted.labels, tested.features.to(context.device), tested.labels),
            classes=len(train.classes),
            train_index=fitted.index,
        )
    return result


def _preset(asked: str, pretrained: Pretrained, share: float) -> str:
    """The file of a preset: some have one for 1 % and one for 10 % of the labels, of which the nearer is taken."""
    name = asked or preset_of(pretrained, FOLDER, "swav" if share < 1 else "lightly")
    names = preset_names(FOLDER)
    return name if name in names else f"{name}_{'1percent' if share < 0.03 else '10percent'}"


def _tuned(context: Context, settings: Any, name: str, train: Source, test: Source, of: int) -> Result:
    """Fine-tune on `train`, which is a part of `of` images."""
    preset = _preset(settings.preset, context.pretrained, len(train) / of)
    chosen = choose(settings, FinetuneRecipe, name, FOLDER, preset)
    recipe: FinetuneRecipe = chosen.recipe
    loader, labels = crop_loader(context, train, recipe, settings.size, name)
    key = dataclasses.asdict(recipe) | {
        **{"images": loader.images, "draws": loader.draws, "size": settings.size},
        **context.identity(),
    }
    tuning = FineTuning(name, context, recipe, loader, labels, test, Resumable(name, context.folder, key))
    try:
        tuning.run()
    finally:
        loader.close()
    result = tuning.result()
    result.deviations = chosen.deviations | view_deviations(context, train, settings.size, name)
    result.counts = {"images": {"labelled": {"found": len(train)}, "test": {"found": len(test)}}}
    result.notes.append(f"preset {preset}, {len(train)} of {of} images with their labels")
    if left := len(train) % recipe.batch_size:
        result.notes.append(f"each epoch leaves out {left} of {len(train)} images, which fill no batch")
    return result
