"""The three kinds of runs: supervised classification, bootstrapping, budget tuning. Each makes a trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from ..evaluation.labels import match_labels
from ..loading import load_checkpoint, load_image_processor
from ..utils.processors import output_size, processor_for_size
from .bootstrapping import BootstrapTrainer, load_teacher, make_student
from .data import check_images, evaluation_split, image_shapes, sample_rows
from .labels import listed, renumbered
from .processing import adopt_processing, make_image_processor
from .recipe import TrainingRecipe
from .starting_point import StartingPoint, completed, starting_point
from .trainer import BudgetTrainer, ImageClassificationTrainer
from .transforms import AugmentedImages, ImageCollator, ProcessorTransform, TrainingTransform, collate_images
from .tuning import has_classes, make_tuning_trainer


_HELD_OUT = 0.1
_FEWEST_TO_HOLD_OUT = 50


@dataclass
class Plan:
    """A run that can begin.

    Attributes:
        trainer: with model, data and loss.
        processor: to save beside the model.
        recipe: with nothing left open.
        is_classifier: whether the model has a head for classes.
        notes: what is to be said of it.
    """

    trainer: BudgetTrainer
    processor: BaseImageProcessor
    recipe: TrainingRecipe
    is_classifier: bool = True
    notes: list[str] = field(default_factory=list)


def splits_for(splits: DatasetDict, recipe: TrainingRecipe) -> tuple[DatasetDict, list[str]]:
    """The splits that a run uses, with images that can be read and classes to learn, and what is to be said of them.

    Raises:
        ValueError: without a split `train`, for damaged images, or for a single class.
    """
    if "train" not in splits:
        raise ValueError(f"`dataset` must have a split named 'train', got {list(splits)}.")
    notes = []
    name = evaluation_split(splits)
    if name is None and len(splits["train"]) >= _FEWEST_TO_HOLD_OUT:
        train, held_out = hold_out(splits["train"], recipe.seed)
        if len(held_out) > 0:
            splits, name = DatasetDict({**splits, "train": train, "validation": held_out}), "validation"
            kept = f"{len(held_out)} images, drawn from all, are kept back."
        else:
            kept = "none of its images is kept back, for each class has few."
        notes.append(f"There is no validation or test split: {kept}")
    train = sample_rows(splits["train"], recipe.limit, recipe.seed)
    used = {"train": train} if name is None else {"train": train, name: splits[name]}
    for key, split in used.items():
        if len(split) == 0:
            raise ValueError(f"The split {key!r} is empty.")
    if recipe.needs_labels:
        notes += _class_notes(train)
    for key, split in used.items():
        check_images(split, key)
    return DatasetDict(used), notes


def _class_notes(train: Dataset) -> list[str]:
    names = train.features["label"].names
    present = set(train.with_format(None)["label"])
    if len(present) < 2:
        only = names[next(iter(present))]
        raise ValueError(f"`dataset` has one class in training, {only!r}: a classifier needs at least two.")
    absent = [name for index, name in enumerate(names) if index not in present]
    return [f"No training image shows {listed(absent)}: nothing is learned of them."] if absent else []


def hold_out(split: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, a tenth) of a split; the same share of every class, where there are labels."""
    labels = split.with_format(None)["label"] if "label" in split.features else [0] * len(split)
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held += rows[: round(len(rows) * _HELD_OUT)].tolist()
    rest = np.setdiff1d(np.arange(len(split)), held).tolist()
    return split.select(rest), split.select(sorted(held))


def make_plan(
    recipe: TrainingRecipe, splits: DatasetDict, arguments: Callable[[TrainingRecipe], TrainingArguments]
) -> Plan:
    """The trainer of a recipe.

    Args:
        recipe: the choices.
        splits: as `splits_for` gives them.
        arguments: completed recipe -> arguments of `Trainer`.
    """
    if recipe.bootstrap_from is not None:
        return _bootstrapping(recipe, splits, arguments)
    if recipe.tune_budgets is not None:
        trainer, processor, recipe, notes = make_tuning_trainer(recipe, splits, arguments, datasets_of, collate_images)
        return Plan(trainer, processor, recipe, has_classes(trainer.model), notes)
    return _classification(recipe, splits, arguments)


def datasets_of(
    recipe: TrainingRecipe, splits: DatasetDict, processor: BaseImageProcessor
) -> dict[str, AugmentedImages | None]:
    """`train_dataset`, augmented, and `eval_dataset`, processed as the saved processor does, or None without one."""
    stats = (list(recipe.image_mean), list(recipe.image_std))
    transform = TrainingTransform(recipe.augmentation, tuple(recipe.image_size), *stats)
    name = evaluation_split(splits)
    evaluated = name and AugmentedImages(splits[name], ProcessorTransform(processor, recipe.num_channels))
    trained = AugmentedImages(splits["train"], transform, seed=recipe.seed)
    for images in filter(None, (trained, evaluated)):
        images[0]  # what no image of the data can be is refused before training
    return {"train_dataset": trained, "eval_dataset": evaluated}


def _classification(
    recipe: TrainingRecipe, splits: DatasetDict, arguments: Callable[[TrainingRecipe], TrainingArguments]
) -> Plan:
    names = splits["train"].features["label"].names
    point = starting_point(recipe, names, image_shapes(splits["train"]), len(splits["train"]))
    recipe = point.recipe
    splits = DatasetDict({key: renumbered(split, point.numbers, point.label_names) for key, split in splits.items()})
    collator = ImageCollator(len(names), recipe.mixup, recipe.cutmix, seed=recipe.seed)
    trainer = ImageClassificationTrainer(
        model=point.model,
        args=arguments(recipe),
        **datasets_of(recipe, splits, point.processor),
        data_collator=collator,
        eval_collator=collator.without_mixing(),
        temperature=recipe.temperature,
        label_smoothing=recipe.label_smoothing,
        **_teacher(recipe, point),
    )
    return Plan(trainer, point.processor, recipe, notes=point.notes)


def _teacher(recipe: TrainingRecipe, point: StartingPoint) -> dict:
    """Arguments of `ImageClassificationTrainer` for the teacher of a recipe."""
    if recipe.teacher is None:
        return {}
    trust = {"trust_remote_code": recipe.trust_remote_code, "argument": "teacher"}
    teacher = load_checkpoint(recipe.teacher, AutoModelForImageClassification, **trust, dtype=torch.float32)
    label_map = recipe.label_map if recipe.init_from is None else None
    try:
        classes = match_labels(point.label_names, teacher.config.id2label, label_map)
    except ValueError as error:
        raise ValueError(f"`teacher` {recipe.teacher!r} does not know the classes of the data. {error}") from error
    theirs = _processing_of(teacher, load_image_processor(recipe.teacher, **trust), recipe)
    return {
        "teacher": teacher,
        "teacher_classes": None if classes == list(range(teacher.config.num_labels)) else classes,
        "image_stats": _stats(recipe, theirs),
        "teacher_size": theirs.image_size,
    }


def _processing_of(teacher: PreTrainedModel, processor: BaseImageProcessor, recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with the image size and the statistics of a teacher: what it sees is its own affair."""
    if output_size(processor) is None:
        processor = processor_for_size(processor, getattr(teacher.config, "image_size", None) or recipe.image_size)
    open_recipe = replace(recipe, image_size=None, num_channels=None, image_mean=None, image_std=None)
    return adopt_processing(open_recipe, processor, teacher.config)[0]


def _stats(recipe: TrainingRecipe, theirs: TrainingRecipe) -> tuple | None:
    """((mean, std) of the student, (mean, std) of the teacher), where they differ."""
    stats = tuple((list(one.image_mean), list(one.image_std)) for one in (recipe, theirs))
    return stats if stats[0] != stats[1] else None


def _bootstrapping(
    recipe: TrainingRecipe, splits: DatasetDict, arguments: Callable[[TrainingRecipe], TrainingArguments]
) -> Plan:
    teacher = load_teacher(recipe.bootstrap_from, recipe)
    processor = load_image_processor(
        recipe.bootstrap_from, trust_remote_code=recipe.trust_remote_code, argument="bootstrap_from"
    )
    theirs = _processing_of(teacher, processor, recipe)
    recipe = replace(
        recipe,
        image_size=recipe.image_size or theirs.image_size,
        num_channels=theirs.num_channels,
        image_mean=recipe.image_mean or theirs.image_mean,
        image_std=recipe.image_std or theirs.image_std,
    )
    recipe = completed(recipe, len(splits["train"]), learning_rate=1e-3)
    shape = {"num_blocks": recipe.num_blocks, "frozen_share": recipe.frozen_share}
    student, _ = make_student(
        teacher,
        **{name: value for name, value in shape.items() if value is not None},
        **{"image_size": list(recipe.image_size), **recipe.model_options},
    )
    processor = make_image_processor(recipe, student.config)
    trainer = BootstrapTrainer(
        model=student,
        args=arguments(recipe),
        **datasets_of(recipe, splits, processor),
        data_collator=collate_images,
        teacher=teacher,
        image_stats=_stats(recipe, theirs),
        teacher_size=theirs.image_size,
    )
    return Plan(trainer, processor, recipe, is_classifier=False)


__all__ = ["Plan", "datasets_of", "hold_out", "make_plan", "splits_for"]
