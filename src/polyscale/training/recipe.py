"""What a training run is made of, and the published recipes."""

from dataclasses import dataclass, field

from ..utils.validation import check_choice
from .data import AUGMENTATIONS


@dataclass
class TrainingRecipe:
    """The choices of a training run. Defaults suit small pictures from scratch.

    Args:
        family: model type: "flexivit" (when None), "quadtree_vit", "sparseformer" (with `bootstrap_from`), ...
        preset: a published size of the family ("flexivit_small", ...); None for the family's default.
        model_options: fields of the family's config that differ from the preset.
        init_from: a checkpoint of the family to start from, instead of random weights; a classifier for other classes
            gets a new head.
        bootstrap_from: a ViT to bootstrap a SparseFormer from (arXiv 2312.01987): the student has its last blocks and
            learns its final token. Labels are not used; what is saved is a `SparseFormerModel`.
        num_blocks: blocks of that ViT to take over; two thirds when None.
        frozen_share: share of its depth, counted from the end, that stays as it is; a third when None.
        image_size: (height, width) in pixels, or int; when None 32, or what the ViT of `bootstrap_from` sees.
        image_mean: mean of each channel, of values in [0, 1]; when None 0.5, or that of the ViT.
        image_std: standard deviation of each channel; when None 0.5, or that of the ViT.
        limit: train on the first pictures only, that many; None for all.
        augmentation: see `training_transform`.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        label_smoothing: of the cross entropy.
        teacher: an image-classification checkpoint to distil from, or None.
        temperature: of the distillation.
        epochs: passes over the training split; with `bootstrap_from` also 0, which saves the student as it starts.
        batch_size: pictures a process a micro-batch.
        gradient_accumulation_steps: micro-batches an optimiser step.
        learning_rate: peak of the cosine schedule.
        warmup: share of the steps in which the learning rate rises from 0 (below 1), or their number.
        weight_decay: of AdamW; biases, norms and scales have none.
        max_grad_norm: gradient norm to clip at; 0 for no clipping.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations in the backward pass.
        ema_decay: decay of an exponential moving average of the weights, which is then what is saved; None for none.
        num_workers: processes that read pictures.
        seed: of weights, order, augmentation and patch sizes.
        save_dtype: "float16" or "bfloat16" halves the weights file, which still loads as float32.
        save_steps: optimiser steps between checkpoints to resume from; None for one an epoch.
    """

    family: str | None = None
    preset: str | None = None
    model_options: dict = field(default_factory=dict)
    init_from: str | None = None
    bootstrap_from: str | None = None
    num_blocks: int | None = None
    frozen_share: float | None = None
    image_size: int | tuple[int, int] | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    limit: int | None = None
    augmentation: str = "crop"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    epochs: float = 10
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    num_workers: int = 2
    seed: int = 0
    save_dtype: str | None = None
    save_steps: int | None = None

    def __post_init__(self):
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        check_choice("save_dtype", self.save_dtype, (None, "float16", "bfloat16"))
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "temperature"):
            may_be_zero = name == "epochs" and self.bootstrap_from is not None
            if getattr(self, name) < 0 or (getattr(self, name) == 0 and not may_be_zero):
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("mixup", "cutmix", "label_smoothing", "warmup", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay}.")
        if self.bootstrap_from is None:
            self._complete_classification()
        else:
            self._check_bootstrapping()

    def _complete_classification(self) -> None:
        for name in ("num_blocks", "frozen_share"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` goes with `bootstrap_from`, which is not given.")
        self.family = self.family or "flexivit"
        self.image_size = 32 if self.image_size is None else self.image_size
        self.image_mean, self.image_std = self.image_mean or (0.5,) * 3, self.image_std or (0.5,) * 3

    def _check_bootstrapping(self) -> None:
        if self.family not in (None, "sparseformer"):
            raise ValueError(f"`bootstrap_from` makes a SparseFormer: `family` must be left out, got {self.family!r}.")
        self.family = "sparseformer"
        for name, reason in (
            ("preset", "the ViT brings the size; change fields by `model_options`"),
            ("init_from", "the ViT is what the student starts from"),
            ("teacher", "the ViT is the teacher"),
            ("mixup", "there are no labels to mix"),
            ("cutmix", "there are no labels to mix"),
            ("label_smoothing", "there are no labels to smooth"),
        ):
            if getattr(self, name):
                raise ValueError(f"`bootstrap_from` and `{name}` exclude each other: {reason}.")
        if self.temperature != 1:
            raise ValueError("`bootstrap_from` and `temperature` exclude each other: no probabilities are compared.")


# Batch sizes are those of all processes together in the papers; here they are per process.
RECIPES = {
    # arXiv 2212.08013, section 3.4 and appendix: distilled at 240 px from a larger-resolution teacher
    "flexivit": {
        "family": "flexivit",
        "preset": "flexivit_base",
        "model_options": {"train_patch_sizes": [8, 10, 12, 15, 16, 20, 24, 30, 40, 48]},
        "image_size": 240,
        "augmentation": "resized-crop",
        "mixup": 0.2,
        "epochs": 90,
        "batch_size": 1024,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "warmup": 5000,
    },
    # arXiv 2304.03768, section 4: supervised on ImageNet-1k
    "sparseformer_v1": {
        "family": "sparseformer",
        "preset": "sparseformer_v1_tiny",
        "model_options": {"restrict_grad_norm": True, "drop_path_rate": 0.2},
        "image_size": 224,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
        "augmentation": "trivial",
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "epochs": 300,
        "batch_size": 1024,
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "max_grad_norm": 5.0,
        "warmup": 0.067,
        "ema_decay": 0.9999,
    },
}


def make_recipe(name: str | None = None, model_options: dict | None = None, **choices) -> TrainingRecipe:
    """A published recipe, or the default one, with some choices replaced.

    Args:
        name: a key of `RECIPES`, or None.
        model_options: config fields, added to those of the recipe.
        choices: fields of `TrainingRecipe`; None keeps the recipe's.
    """
    if name is not None:
        check_choice("recipe", name, tuple(RECIPES))
    base = dict(RECIPES[name]) if name else {}
    options = {**base.pop("model_options", {}), **(model_options or {})}
    given = {field_name: value for field_name, value in choices.items() if value is not None}
    return TrainingRecipe(**{**base, **given, "model_options": options})


__all__ = ["RECIPES", "TrainingRecipe", "make_recipe"]
