"""`polyscale train`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_fields, parse_numbers, parse_size, split_list
from .printing import reporting


def train(
    dataset: Annotated[str, typer.Argument(help="Folder of pictures, parquet file or folder, or hub name.")],
    output_dir: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not exist.")],
    recipe: Annotated[str | None, typer.Option(help="Published recipe; other options override it.")] = None,
    family: Annotated[str | None, typer.Option(help="Model type, e.g. flexivit.")] = None,
    preset: Annotated[str | None, typer.Option(help="Published size, e.g. flexivit_small.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Checkpoint to fine-tune instead of random weights.")] = None,
    bootstrap_from: Annotated[
        str | None,
        typer.Option(metavar="VIT", help="Bootstrap a SparseFormer from this ViT, on pictures without labels."),
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of VIT to take over; two thirds by default.")] = None,
    frozen_share: Annotated[
        float | None, typer.Option(help="Share of VIT's blocks, from the end, that stays as it is; 1/3 by default.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=JSON", help="Field of the model's config; repeat.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(metavar="N|HxW", help="Pixels.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="X ...", help="Mean of each channel.")] = None,
    std: Annotated[str | None, typer.Option(metavar="X ...", help="Standard deviation of each channel.")] = None,
    patch_sizes: Annotated[
        str | None, typer.Option(metavar="N|HxW ...", help="FlexiViT: sizes to draw from in training.")
    ] = None,
    patch_size_probs: Annotated[
        str | None, typer.Option(metavar="P ...", help="A probability for each of them; uniform by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Train on the first pictures only.")] = None,
    augmentation: Annotated[str | None, typer.Option(help="none, crop, resized-crop or trivial.")] = None,
    mixup: Annotated[float | None, typer.Option(help="Alpha of mixup; 0 for none.")] = None,
    cutmix: Annotated[float | None, typer.Option(help="Alpha of cutmix; 0 for none.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of the cross entropy.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Image-classification checkpoint to distil from.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the distillation.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a process and micro-batch.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the cosine schedule.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps (below 1) or their number.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip gradients at this norm; 0 for none.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time."),
    ] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Save an average of the weights with this decay.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that read pictures.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, augmentation and patch sizes.")] = None,
    save_dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16: half the file size.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; one an epoch by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run of OUTPUT_DIR.")] = False,
) -> None:
    """Train an image classifier whose token budget is chosen at run time, or bootstrap a SparseFormer."""
    choices = {
        "family": family,
        "preset": preset,
        "init_from": init_from,
        "bootstrap_from": bootstrap_from,
        "num_blocks": num_blocks,
        "frozen_share": frozen_share,
        "image_size": image_size and parse_size(image_size),
        "image_mean": mean and tuple(parse_numbers(mean)),
        "image_std": std and tuple(parse_numbers(std)),
        "limit": limit,
        "augmentation": augmentation,
        "mixup": mixup,
        "cutmix": cutmix,
        "label_smoothing": label_smoothing,
        "teacher": teacher,
        "temperature": temperature,
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "ema_decay": ema_decay,
        "num_workers": num_workers,
        "seed": seed,
        "save_dtype": save_dtype,
        "save_steps": save_steps,
    }
    options = parse_fields(set_)
    if patch_sizes is not None:
        options["train_patch_sizes"] = [parse_size(size) for size in split_list(patch_sizes)]
    if patch_size_probs is not None:
        options["train_patch_size_probs"] = parse_numbers(patch_size_probs)

    with reporting("train"):
        from polyscale.training import make_recipe
        from polyscale.training import train as run

        metrics = run(dataset, output_dir, make_recipe(recipe, options, **choices), resume=resume)
        typer.echo(f"Wrote {output_dir}")
        for name, value in metrics.items():
            typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


__all__ = ["train"]
