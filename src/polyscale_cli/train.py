"""`polyscale train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_fields, parse_numbers, parse_size, split_list
from .printing import reporting


def train(
    dataset: Annotated[
        str, typer.Argument(help="Folder of images (a folder for each class), parquet file or folder, or hub name.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not exist.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Published recipe, which other options override: flexivit, sparseformer_v1."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="flexivit (default), quadtree_vit, sparseformer, s2_vision, or a type of transformers."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published size, e.g. flexivit_small, quadtree_vit_base; by default what fits the images."),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Checkpoint to fine-tune: bundled name, folder or hub name; its processing is kept."),
    ] = None,
    bootstrap_from: Annotated[
        str | None,
        typer.Option(metavar="VIT", help="Bootstrap a SparseFormer from this ViT, on images without labels."),
    ] = None,
    tune_budgets: Annotated[
        str | None,
        typer.Option(
            metavar="LOW HIGH ...",
            help="Teach the model of --init-from smaller budgets, without labels: shares of its full one.",
        ),
    ] = None,
    tune_by: Annotated[
        str | None,
        typer.Option(help="What they are shares of: budget, the family's (default), or merging, of tokens."),
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of VIT to take over; two thirds by default.")] = None,
    frozen_share: Annotated[
        float | None, typer.Option(help="Share of VIT's blocks, from the end, that stays as it is; 1/3 by default.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=JSON", help="Field of the model's config; repeat.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Pixels; by default what fits the images, at most 224.")
    ] = None,
    num_channels: Annotated[
        int | None, typer.Option(help="1 (grey), 3 (RGB), or as many as arrays (.npy) have; by default theirs.")
    ] = None,
    mean: Annotated[str | None, typer.Option(metavar="X ...", help="Mean of each channel; 0.5 by default.")] = None,
    std: Annotated[
        str | None, typer.Option(metavar="X ...", help="Standard deviation of each channel; 0.5 by default.")
    ] = None,
    patch_sizes: Annotated[
        str | None,
        typer.Option(metavar="N|HxW ...", help="FlexiViT: sizes to draw from; by default some that divide the image."),
    ] = None,
    patch_size_probs: Annotated[
        str | None, typer.Option(metavar="P ...", help="A probability for each of them; uniform by default.")
    ] = None,
    label_map: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NAME", help="Class of the data = class of the checkpoint, or a JSON file; repeat."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Train on that many images, drawn from all.")] = None,
    augmentation: Annotated[str | None, typer.Option(help="none, crop (default), resized-crop or trivial.")] = None,
    mixup: Annotated[float | None, typer.Option(help="Alpha of mixup; 0, none, by default.")] = None,
    cutmix: Annotated[float | None, typer.Option(help="Alpha of cutmix; 0, none, by default.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of the cross entropy; 0 by default.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Image-classification checkpoint to distil from.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the distillation; 1 by default.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; 10 by default.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per process and micro-batch; by default what fits, at most 128."),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Micro-batches per step; 1 by default.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of the cosine schedule; 1e-3 by default, 1e-4 with --init-from, 5e-5 with --tune-budgets."
        ),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps (below 1) or their number; 0.05 by default.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW; 0.05 by default.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip gradients at this norm; 1 by default, 0 for none.")
    ] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time."),
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(help="Evaluate and save an average of the weights with this decay.")
    ] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that read images; 2 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, augmentation, budgets; default 0.")] = None,
    save_dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16: half the file size.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; every epoch by default.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let checkpoints run code of their own.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run of OUTPUT_DIR, with its own options.")
    ] = False,
) -> None:
    """Train an image classifier whose token budget is chosen at run time, bootstrap a SparseFormer, or teach a model
    smaller budgets.
    """
    choices = {
        "family": family,
        "preset": preset,
        "init_from": init_from,
        "bootstrap_from": bootstrap_from,
        "tune_budgets": tune_budgets and tuple(parse_numbers(tune_budgets, "--tune-budgets")),
        "tune_by": tune_by,
        "num_blocks": num_blocks,
        "frozen_share": frozen_share,
        "image_size": image_size and parse_size(image_size, "--image-size"),
        "num_channels": num_channels,
        "image_mean": mean and tuple(parse_numbers(mean, "--mean")),
        "image_std": std and tuple(parse_numbers(std, "--std")),
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
        "trust_remote_code": trust_remote_code,
    }
    options = parse_fields(set_)
    if patch_sizes is not None:
        options["train_patch_sizes"] = [parse_size(size, "--patch-sizes") for size in split_list(patch_sizes)]
    if patch_size_probs is not None:
        options["train_patch_size_probs"] = parse_numbers(patch_size_probs, "--patch-size-probs")

    with reporting("train"):
        from polyscale.evaluation.labels import read_label_map
        from polyscale.training import given_choices, make_recipe
        from polyscale.training import train as run

        choices["label_map"] = read_label_map(label_map) or None
        make = given_choices if resume else make_recipe
        metrics = run(dataset, output_dir, make(recipe, options, **choices) or None, resume=resume)
        if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
            return
        seconds = metrics["train_seconds"]
        typer.echo(f"Wrote {output_dir} after {seconds:.0f} s of training; its README.md is a model card.")


__all__ = ["train"]
