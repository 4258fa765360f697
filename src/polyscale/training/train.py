"""Training on `transformers.Trainer`, of an image classifier of any family or by bootstrapping: the function behind
`polyscale train`."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoints import resolve_checkpoint
from ..evaluation.metrics import TopKAccuracy
from ..utils.validation import to_pair
from .bootstrapping import BootstrapTrainer, load_teacher, make_student
from .callbacks import DatasetEpochCallback, PatchSizeCallback
from .data import (
    AugmentedImages,
    ImageCollator,
    collate_pictures,
    evaluation_split,
    load_image_dataset,
    training_transform,
)
from .ema import EMACallback
from .recipe import TrainingRecipe
from .trainer import ImageClassificationTrainer


def make_model(recipe: TrainingRecipe, label_names: list[str]) -> PreTrainedModel:
    """The classifier that a recipe starts from: random weights, or `recipe.init_from` with a head for these labels."""
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    options = {**recipe.model_options, **labels}
    if recipe.init_from is not None:
        if recipe.preset is not None:
            raise ValueError("`preset` and `init_from` exclude each other: a checkpoint brings its own size.")
        return AutoModelForImageClassification.from_pretrained(
            recipe.init_from, ignore_mismatched_sizes=True, dtype=torch.float32, **options
        )
    if recipe.family not in CONFIG_MAPPING:
        raise ValueError(f"`family` must be a model type that transformers or polyscale knows, got {recipe.family!r}.")
    config_class = CONFIG_MAPPING[recipe.family]
    if recipe.preset is not None:
        config = config_class.preset(recipe.preset, image_size=recipe.image_size, **options)
    else:
        config = config_class(image_size=recipe.image_size, **options)
    return AutoModelForImageClassification.from_config(config)


def make_image_processor(recipe: TrainingRecipe, config: PreTrainedConfig) -> TorchvisionBackend:
    """The processor that is saved beside the model: resize to `recipe.image_size`, the recipe's mean and deviation.

    What it shares with the model's config by name (the patch sizes that a picture must fit) is taken from there.
    """
    if recipe.init_from is not None:
        processor = AutoImageProcessor.from_pretrained(recipe.init_from)
    else:
        processor = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[recipe.family]]["torchvision"]()
    for name in processor.valid_kwargs.__annotations__:
        if hasattr(config, name):
            setattr(processor, name, getattr(config, name))
    height, width = to_pair(recipe.image_size, "image_size")
    processor.size = type(processor.size)(height=height, width=width)
    processor.crop_size = type(processor.size)(height=height, width=width)
    processor.do_center_crop = False
    processor.image_mean, processor.image_std = list(recipe.image_mean), list(recipe.image_std)
    return processor


def _training_arguments(recipe: TrainingRecipe, work_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        activation_checkpointing=recipe.gradient_checkpointing,
        dataloader_num_workers=recipe.num_workers,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="no",
        save_strategy="epoch" if recipe.save_steps is None else "steps",
        save_steps=recipe.save_steps or 500,
        save_total_limit=2,
        logging_steps=50,
        report_to=[],
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
    )


def _top1(prediction) -> dict[str, float]:
    return TopKAccuracy(ks=(1,)).compute(predictions=prediction.predictions, references=prediction.label_ids)


def _pictures(recipe: TrainingRecipe, splits: DatasetDict) -> dict[str, AugmentedImages | None]:
    """`train_dataset`, augmented, and `eval_dataset`, or None where there is nothing to evaluate on."""
    size = to_pair(recipe.image_size, "image_size")
    stats = (list(recipe.image_mean), list(recipe.image_std))
    train_split, eval_name = splits["train"], evaluation_split(splits)
    train_split = train_split.select(range(len(train_split))[: recipe.limit])
    return {
        "train_dataset": AugmentedImages(
            train_split, training_transform(recipe.augmentation, size, *stats), seed=recipe.seed
        ),
        "eval_dataset": eval_name and AugmentedImages(splits[eval_name], training_transform("none", size, *stats)),
    }


def _classification_trainer(
    recipe: TrainingRecipe, splits: DatasetDict, args: TrainingArguments, callbacks: list[TrainerCallback]
) -> tuple[Trainer, TorchvisionBackend]:
    """The trainer of a classifier, and the image processor to save beside it."""
    label_names = splits["train"].features["label"].names
    model = make_model(recipe, label_names)
    teacher, image_stats = None, None
    if recipe.teacher is not None:
        teacher = AutoModelForImageClassification.from_pretrained(recipe.teacher)
        if teacher.config.num_labels != len(label_names):
            raise ValueError(
                f"`teacher` has {teacher.config.num_labels} classes and the data set {len(label_names)}: they must be "
                "the same classes in the same order."
            )
        teacher_processor = AutoImageProcessor.from_pretrained(recipe.teacher)
        image_stats = (
            (list(recipe.image_mean), list(recipe.image_std)),
            (list(teacher_processor.image_mean), list(teacher_processor.image_std)),
        )
    trainer = ImageClassificationTrainer(
        model=model,
        args=args,
        **_pictures(recipe, splits),
        data_collator=ImageCollator(len(label_names), recipe.mixup, recipe.cutmix, seed=recipe.seed),
        compute_metrics=_top1,
        callbacks=[PatchSizeCallback(), *callbacks],
        teacher=teacher,
        temperature=recipe.temperature,
        label_smoothing=recipe.label_smoothing,
        image_stats=image_stats,
    )
    return trainer, make_image_processor(recipe, model.config)


def picture_size(processor: BaseImageProcessor, config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that a processor makes; of the config's where it leaves that open."""
    sizes = [processor.crop_size] if getattr(processor, "do_center_crop", False) else []
    for size in (*sizes, processor.size):
        height, width = (size or {}).get("height"), (size or {}).get("width")
        if height and width:
            return height, width
    return to_pair(config.image_size, "image_size")


def _bootstrap_trainer(
    recipe: TrainingRecipe, splits: DatasetDict, args: TrainingArguments, callbacks: list[TrainerCallback]
) -> tuple[Trainer, TorchvisionBackend]:
    """The trainer of a SparseFormer on a ViT's final tokens, and the image processor to save beside it."""
    teacher = load_teacher(recipe.bootstrap_from)
    teacher_processor = AutoImageProcessor.from_pretrained(resolve_checkpoint(recipe.bootstrap_from))
    teacher_size = picture_size(teacher_processor, teacher.config)
    teacher_stats = (list(teacher_processor.image_mean), list(teacher_processor.image_std))
    recipe = replace(
        recipe,
        image_size=recipe.image_size or teacher_size,
        image_mean=recipe.image_mean or teacher_stats[0],
        image_std=recipe.image_std or teacher_stats[1],
    )
    shape = {"num_blocks": recipe.num_blocks, "frozen_share": recipe.frozen_share}
    student, _ = make_student(
        teacher,
        **{name: value for name, value in shape.items() if value is not None},
        **{"image_size": recipe.image_size, **recipe.model_options},
    )
    stats = (list(recipe.image_mean), list(recipe.image_std))
    trainer = BootstrapTrainer(
        model=student,
        args=args,
        **_pictures(recipe, splits),
        data_collator=collate_pictures,
        callbacks=callbacks,
        teacher=teacher,
        image_stats=(stats, teacher_stats) if stats != teacher_stats else None,
        teacher_size=teacher_size,
    )
    return trainer, make_image_processor(recipe, student.config)


def _last_checkpoint(output_dir: Path, work_dir: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a new run."""
    if output_dir.exists():
        raise ValueError(f"`output_dir` {output_dir} exists already. Name another, or remove it first.")
    checkpoint = get_last_checkpoint(str(work_dir)) if work_dir.is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"`resume`: there is no checkpoint in {work_dir}. Start without `resume`.")
    if checkpoint is not None and not resume:
        raise ValueError(f"{work_dir} holds an unfinished run. Resume it, or remove that folder.")
    return checkpoint


def train(dataset: str | Path, output_dir: str | Path, recipe: TrainingRecipe, resume: bool = False) -> dict:
    """Trains an image classifier, or a SparseFormer by bootstrapping, and writes it, with its image processor, to
    `output_dir`.

    Checkpoints go to `<output_dir>.training` beside it while the run lasts; `output_dir` appears when training is
    done, whole, and that folder goes. Runs unchanged under `accelerate launch`.

    Args:
        dataset: see `load_image_dataset`; its `train` split is learned, `validation` or `test` is scored at the end.
            With `recipe.bootstrap_from` it needs no labels.
        output_dir: must not exist.
        recipe: the choices of the run.
        resume: go on from the last checkpoint of an interrupted run with the same `output_dir`.

    Returns:
        The metrics of `Trainer`: training loss and time, and `eval_top1` at the model's default budget (bootstrapping:
        `eval_loss`, see `BootstrapTrainer`).

    Raises:
        ValueError: if `output_dir` exists, the data or the ViT cannot be used, or there is nothing to resume.
    """
    output_dir = Path(output_dir)
    work_dir = output_dir.with_name(output_dir.name + ".training")
    checkpoint = _last_checkpoint(output_dir, work_dir, resume)
    splits = load_image_dataset(dataset, labelled=recipe.bootstrap_from is None)
    if "train" not in splits:
        raise ValueError(f"`dataset` must have a split named 'train', got {list(splits)}.")
    set_seed(recipe.seed)
    ema = EMACallback(recipe.ema_decay) if recipe.ema_decay is not None else None
    make_trainer = _classification_trainer if recipe.bootstrap_from is None else _bootstrap_trainer
    trainer, processor = make_trainer(recipe, splits, _training_arguments(recipe, work_dir), [ema] if ema else [])
    trainer.add_callback(DatasetEpochCallback(trainer.train_dataset))
    metrics = {}
    if recipe.epochs > 0:
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        if ema:
            ema.copy_to(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.eval_dataset is not None:
        if isinstance(trainer.data_collator, ImageCollator):
            trainer.data_collator = trainer.data_collator.without_mixing()
        metrics |= trainer.evaluate()
    _publish(trainer, processor, output_dir, work_dir, recipe.save_dtype)
    return metrics


def store_weights_as(folder: str | Path, dtype: str) -> None:
    """Casts the weights of a checkpoint's `model.safetensors`; what it loads as, which the config says, stays.

    Args:
        folder: a checkpoint with one weights file.
        dtype: "float16" or "bfloat16".
    """
    path = Path(folder) / "model.safetensors"
    weights = {
        name: weight.to(getattr(torch, dtype)) if weight.is_floating_point() else weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def _publish(
    trainer: Trainer,
    processor: TorchvisionBackend,
    output_dir: Path,
    work_dir: Path,
    save_dtype: str | None,
) -> None:
    """Writes the model and its processor beside the checkpoints, then moves the folder to its place."""
    final = work_dir / "final"
    trainer.save_model(str(final))
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            processor.save_pretrained(final)
            if save_dtype is not None:
                store_weights_as(final, save_dtype)
            (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to a reader
            os.replace(final, output_dir)
            shutil.rmtree(work_dir)


__all__ = ["make_image_processor", "make_model", "store_weights_as", "train"]
