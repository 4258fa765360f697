"""What a training run is made of, and the published recipes."""

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from ..utils.arrays import plain_values
from ..utils.validation import check_choice, check_flag, check_list, shown, to_pair
from .transforms import AUGMENTATIONS


TUNED_BY = ("budget", "merging")
_MOST_SEED = 2**32 - 1  # that NumPy takes
# More of anything that is counted is a slip.
_MOST, _MOST_WORKERS = 2**31, 1024


def _check_json(name: str, value: Any) -> None:
    """Raises ValueError naming `name` for what cannot be kept with a run."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a plain value, which JSON can hold, got {shown(value)}.") from error


@dataclass
class TrainingRecipe:
    """The choices of a training run. What is `None` follows from the data, or from the checkpoint started from.

    Args:
        family (`str`, *optional*): model type: "flexivit" (when `None`), "quadtree_vit", "sparseformer", "s2_vision",
            or any that transformers knows. With `init_from` that of the checkpoint, or one that it is converted to.
        preset (`str`, *optional*): a published size of the family ("flexivit_small", ...); a size that fits the images
            when `None`.
        model_options (`dict`, *optional*): fields of the family's config that differ from the preset.
        init_from (`str`, *optional*): a checkpoint to start from, instead of random weights: a bundled name, a folder
            or a hub name. Its processing of images is kept. A classifier for the same classes, by name, keeps its
            head; another one gets a new head.
        bootstrap_from (`str`, *optional*): a ViT to bootstrap a SparseFormer from (arXiv 2312.01987): the student has
            its last blocks and learns its final token. Labels are not used; what is saved is a `SparseFormerModel`.
        tune_budgets (`(float, float)`, *optional*): shares of the full token budget, the lowest and the highest: the
            model of `init_from` at its full budget teaches itself at budgets drawn between them. Labels are not used.
        tune_by (`str`, *optional*, defaults to `"budget"`): what `tune_budgets` are shares of: `"budget"`, the budget
            of the model's family, or `"merging"`, the tokens that are left of its full budget by `merge_tokens_to`.
        num_blocks (`int`, *optional*): blocks of the ViT of `bootstrap_from` to take over; two thirds when `None`.
        frozen_share (`float`, *optional*): share of its depth, from the end, that stays as it is; a third when `None`.
        image_size (`int` or `(height, width)`, *optional*): in pixels; that of the checkpoint, or one that fits the
            images, when `None`.
        num_channels (`int`, *optional*): 1 (grey), 3 (RGB), or any number for data of arrays; that of the checkpoint,
            or of the images, when `None`.
        image_mean (`tuple[float, ...]`, *optional*): mean of each channel, of values in [0, 1]; that of the
            checkpoint, or 0.5, when `None`.
        image_std (`tuple[float, ...]`, *optional*): standard deviation of each channel, likewise.
        label_map (`dict[str, str]`, *optional*): class of the data -> class of the checkpoint (`init_from`,
            `teacher`), where the names differ.
        limit (`int`, *optional*): train on that many images, drawn from all; on all when `None`.
        augmentation (`str`, *optional*, defaults to `"crop"`): see `TrainingTransform`.
        mixup (`float`, *optional*, defaults to 0.0): alpha of mixup, 0 for none.
        cutmix (`float`, *optional*, defaults to 0.0): alpha of cutmix, 0 for none.
        label_smoothing (`float`, *optional*, defaults to 0.0): of the cross entropy, below 1.
        teacher (`str`, *optional*): an image-classification checkpoint to distil from; its classes are matched by
            name.
        temperature (`float`, *optional*, defaults to 1.0): of the distillation.
        epochs (`float`, *optional*, defaults to 10): passes over the training split; with `bootstrap_from` also 0,
            which saves the student as it starts.
        batch_size (`int`, *optional*): images per process and micro-batch; when `None` at most 128, and at least
            eight steps an epoch where there are images enough.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): micro-batches per optimiser step.
        learning_rate (`float`, *optional*): peak of the cosine schedule; when `None` 1e-3, or 1e-4 with `init_from`,
            or 5e-5 with `tune_budgets`.
        warmup (`float`, *optional*, defaults to 0.05): share of the steps in which the learning rate rises from 0
            (below 1), or their number.
        weight_decay (`float`, *optional*, defaults to 0.05): of AdamW; biases, norms and scales have none.
        max_grad_norm (`float`, *optional*, defaults to 1.0): gradient norm to clip at; 0 for no clipping.
        bf16 (`bool`, *optional*, defaults to `False`): autocast to bfloat16.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): recompute activations in the backward pass.
        ema_decay (`float`, *optional*): decay of an exponential moving average of the weights, which is then what is
            evaluated and saved.
        num_workers (`int`, *optional*, defaults to 2): processes that read images.
        seed (`int`, *optional*, defaults to 0): of weights, order, augmentation and drawn budgets.
        save_dtype (`str`, *optional*): "float16" or "bfloat16" halves the weights file, which still loads as float32.
        save_steps (`int`, *optional*): optimiser steps between checkpoints to resume from; once per epoch when `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether checkpoints may run code of their own.

    Raises:
        ValueError: for a value out of its range, or choices that exclude each other.
    """

    family: str | None = None
    preset: str | None = None
    model_options: dict = field(default_factory=dict)
    init_from: str | None = None
    bootstrap_from: str | None = None
    tune_budgets: tuple[float, float] | None = None
    tune_by: str = "budget"
    num_blocks: int | None = None
    frozen_share: float | None = None
    image_size: int | tuple[int, int] | None = None
    num_channels: int | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    label_map: dict[str, str] | None = None
    limit: int | None = None
    augmentation: str = "crop"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    epochs: float = 10
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
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
    trust_remote_code: bool = False

    def __post_init__(self):
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        check_choice("tune_by", self.tune_by, TUNED_BY)
        check_choice("save_dtype", self.save_dtype, (None, "float16", "bfloat16"))
        self._check_texts()
        for name in ("bf16", "gradient_checkpointing", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        for name in ("model_options", "label_map"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"`{name}` must be a dict, got {shown(value)}.")
        self.model_options = {name: plain_values(value) for name, value in (self.model_options or {}).items()}
        for name, value in self.model_options.items():
            _check_json(f"model_options[{name!r}]", value)
        for name in ("num_labels", "id2label", "label2id", "problem_type"):
            if name in self.model_options:
                reason = "each image has one class" if name == "problem_type" else "the classes are those of the data"
                raise ValueError(f"`model_options` must not hold `{name}`: {reason}.")
        for name in ("batch_size", "gradient_accumulation_steps", "limit", "save_steps", "num_channels", "num_blocks"):
            self._check_number(name, whole=True, minimum=1, maximum=_MOST)
        self._check_number("num_workers", whole=True, maximum=_MOST_WORKERS)
        self._check_number("seed", whole=True, maximum=_MOST_SEED)
        for name in ("epochs", "mixup", "cutmix", "label_smoothing", "warmup", "weight_decay", "max_grad_norm"):
            self._check_number(name)
        for name in ("learning_rate", "temperature"):
            self._check_number(name, above=0)
        self._check_number("ema_decay", above=0, below=1)
        self._check_number("label_smoothing", below=1)
        self._check_number("frozen_share", maximum=1)
        if self.epochs == 0 and self.bootstrap_from is None:
            raise ValueError("`epochs` must be above 0, got 0.")
        if self.image_size is not None:
            self.image_size = to_pair(self.image_size, "image_size")
        self._check_statistics()
        if self.tune_budgets is not None:
            self._check_tuning()
        elif self.tune_by != "budget":
            raise ValueError(f"`tune_by` {self.tune_by!r} goes with `tune_budgets`, which is not given.")
        elif self.bootstrap_from is not None:
            self._check_bootstrapping()
        else:
            self._check_classification()

    @property
    def needs_labels(self) -> bool:
        """Whether the run learns from labels."""
        return self.bootstrap_from is None and self.tune_budgets is None

    def _check_texts(self) -> None:
        for name in ("family", "preset", "init_from", "bootstrap_from", "teacher"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str | os.PathLike) or not os.fspath(value):
                    raise ValueError(f"`{name}` must be text, got {shown(value)}.")
                setattr(self, name, os.fspath(value))

    def _check_number(
        self,
        name: str,
        whole: bool = False,
        minimum: float = 0,
        above: float | None = None,
        below: float = math.inf,
        maximum: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        if value is None and _defaults()[name] is None:
            return
        value = plain_values(value)
        setattr(self, name, value)
        kind = Integral if whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a {'whole' if whole else 'finite'} number, got {value!r}.")
        if above is not None and value <= above:
            limits = f"between {above} and {below}" if below < math.inf else f"above {above}"
            raise ValueError(f"`{name}` must be {limits}, got {value}.")
        if value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if value >= below and above is not None:
            raise ValueError(f"`{name}` must be between {above} and {below}, got {value}.")
        if value >= below or value > maximum:
            limit = f"below {below}" if value >= below else f"at most {maximum}"
            raise ValueError(f"`{name}` must be {limit}, got {value}.")

    def _check_statistics(self) -> None:
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is None:
                continue
            given = [values] if isinstance(values, Real) else values
            values = tuple(map(plain_values, check_list(name, given, Real, "numbers, one for each channel")))
            if not all(math.isfinite(value) and not isinstance(value, bool) for value in values):
                raise ValueError(f"`{name}` must hold a finite number for each channel, got {values}.")
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"`image_std` must be above 0: values are divided by it; got {values}.")
            setattr(self, name, values)
        lengths = {len(values) for values in (self.image_mean, self.image_std) if values is not None}
        if self.num_channels is not None:
            lengths.add(self.num_channels)
        if len(lengths) > 1:
            raise ValueError(
                f"`image_mean`, `image_std` and `num_channels` must agree: one number for each channel; got "
                f"{self.image_mean}, {self.image_std} and {self.num_channels}."
            )

    def _exclude(self, mode: str, reasons: dict[str, str]) -> None:
        defaults = _defaults()
        for name, reason in reasons.items():
            if getattr(self, name) not in (defaults[name], None):
                raise ValueError(f"`{mode}` and `{name}` exclude each other: {reason}.")

    def _check_classification(self) -> None:
        for name in ("num_blocks", "frozen_share"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` goes with `bootstrap_from`, which is not given.")
        if self.init_from is not None:
            self._exclude("init_from", {"preset": "a checkpoint brings its own size"})
        if self.teacher is None and self.temperature != 1:
            raise ValueError("`temperature` goes with `teacher`, which is not given.")
        if self.label_map and self.init_from is None and self.teacher is None:
            raise ValueError("`label_map` goes with `init_from` or `teacher`: there are no other classes to map to.")

    def _check_bootstrapping(self) -> None:
        if self.family not in (None, "sparseformer"):
            raise ValueError(f"`bootstrap_from` makes a SparseFormer: `family` must be left out, got {self.family!r}.")
        self.family = "sparseformer"
        self._exclude(
            "bootstrap_from",
            {
                "preset": "the ViT brings the size; change fields by `model_options`",
                "init_from": "the ViT is what the student starts from",
                "teacher": "the ViT is the teacher",
                "mixup": "there are no labels to mix",
                "cutmix": "there are no labels to mix",
                "label_smoothing": "there are no labels to smooth",
                "label_map": "there are no labels to map",
                "temperature": "no probabilities are compared",
            },
        )

    def _check_tuning(self) -> None:
        shares = check_list("tune_budgets", self.tune_budgets, Real, "two shares, the lowest and the highest")
        shares = tuple(map(plain_values, shares))
        if len(shares) != 2 or bool in map(type, shares) or not 0 < shares[0] <= shares[1] <= 1:
            raise ValueError(
                "`tune_budgets` must be two shares of the full budget, the lowest and the highest, such as 0.3 and "
                f"1.0; got {shares}."
            )
        self.tune_budgets = shares
        if self.init_from is None:
            raise ValueError("`tune_budgets` needs `init_from`: the model that is tuned.")
        self._exclude(
            "tune_budgets",
            {
                "preset": "a checkpoint brings its own size",
                "bootstrap_from": "each has a teacher of its own",
                "teacher": "the model is its own teacher",
                "mixup": "there are no labels to mix",
                "cutmix": "there are no labels to mix",
                "label_smoothing": "there are no labels to smooth",
                "label_map": "there are no labels to map",
                "num_blocks": "it goes with `bootstrap_from`",
                "frozen_share": "it goes with `bootstrap_from`",
            },
        )

    def to_json(self) -> dict:
        """The fields as JSON holds them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, choices: dict) -> "TrainingRecipe":
        """What `to_json` gave.

        Raises:
            ValueError: for fields that a recipe does not have.
        """
        unknown = sorted(choices.keys() - _defaults().keys())
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no field of a recipe of this version of polyscale.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in choices.items()})


def _defaults() -> dict[str, Any]:
    """The default of each field of a recipe."""
    return {entry.name: entry.default for entry in fields(TrainingRecipe)}


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

    Raises:
        ValueError: for an unknown recipe or field, or values that `TrainingRecipe` refuses.
    """
    for choice in choices:
        if choice not in _defaults():
            near = difflib.get_close_matches(choice, _defaults(), 1)
            raise ValueError(f"`{choice}` is no field of a recipe{f'; did you mean `{near[0]}`?' if near else '.'}")
    return TrainingRecipe(**given_choices(name, model_options, **choices))


def as_recorded(choices: Mapping[str, Any], recipe: TrainingRecipe) -> dict[str, Any]:
    """Choices as a recipe of them holds them, for a look at what they change: 32 and (32, 32) are one image size."""
    whole = make_recipe(**{**vars(recipe), **choices}).to_json()
    return {name: whole[name] for name in choices}


def given_choices(name: str | None = None, model_options: dict | None = None, **choices) -> dict:
    """The fields of a recipe that are chosen, and no others. Arguments: `make_recipe`."""
    if name is not None:
        check_choice("recipe", name, tuple(RECIPES))
    if not isinstance(model_options, Mapping | None):
        raise ValueError(f"`model_options` must be a dict, got {shown(model_options)}.")
    fields = dict(RECIPES[name]) if name else {}
    options = {**fields.pop("model_options", {}), **(model_options or {})}
    fields |= {field_name: value for field_name, value in choices.items() if value is not None}
    return {**fields, "model_options": options} if options else fields


__all__ = ["RECIPES", "TrainingRecipe", "as_recorded", "given_choices", "make_recipe"]
