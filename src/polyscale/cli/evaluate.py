"""`polyscale evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_numbers, parse_size, split_list


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Checkpoint of this library, or any transformers/timm ViT or big_vision npz.")
    ],
    dataset: Annotated[str, typer.Argument(help="Folder of pictures, parquet file or folder, or hub name.")],
    patch_sizes: Annotated[str | None, typer.Option(metavar="N|HxW ...", help="FlexiViT: patch sizes.")] = None,
    num_tokens: Annotated[str | None, typer.Option(metavar="N ...", help="Quadtree ViT: token budgets.")] = None,
    image_sizes: Annotated[str | None, typer.Option(metavar="N|HxW ...", help="Image sizes in pixels.")] = None,
    resize_method: Annotated[str | None, typer.Option(help="pi or interpolate; the checkpoint's by default.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the side that the centre crop keeps.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="X ...", help="Numbers, or imagenet, inception, clip.")] = None,
    std: Annotated[str | None, typer.Option(metavar="X ...", help="Numbers, or imagenet, inception, clip.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")] = None,
    split: Annotated[str | None, typer.Option(help="Split; validation or test by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first pictures.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a forward pass.", min=1)] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run in bfloat16.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json and accuracy.png; made if missing.")
    ] = None,
) -> None:
    """Measure accuracy and speed at several token budgets."""
    import torch
    from rich.console import Console

    from ..evaluation import evaluate_budgets, load_classifier, plot_results, results_table, write_json
    from ..training.data import evaluation_split, load_image_dataset

    budgets = split_list(patch_sizes if patch_sizes is not None else num_tokens)
    try:
        options = {"resize_method": resize_method} if resize_method else {}
        classifier, processor = load_classifier(model, **options)
        classifier.to(
            device=torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu",
            dtype=torch.bfloat16 if bf16 else None,
        )
        splits = load_image_dataset(dataset)
        rows = splits[evaluation_split(splits, split) or next(iter(splits))]
        results = evaluate_budgets(
            classifier,
            processor,
            rows.select(range(len(rows))[:limit]),
            budgets=budgets and [parse_size(value) for value in budgets],
            image_sizes=image_sizes and [parse_size(value) for value in split_list(image_sizes)],
            crop_pct=crop_pct,
            mean=_statistic(mean),
            std=_statistic(std),
            interpolation=interpolation,
            batch_size=batch_size,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"polyscale evaluate: {error}", err=True)
        raise typer.Exit(2) from error
    Console().print(results_table(results, title=str(model)))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(results, output / "results.json")
        plot_results({Path(model).name: results}, output / "accuracy.png")
        typer.echo(f"Wrote {output / 'results.json'} and {output / 'accuracy.png'}")


def _statistic(text: str | None) -> str | list[float] | None:
    values = split_list(text)
    if values is None or (len(values) == 1 and values[0].isalpha()):
        return text
    return parse_numbers(text)


__all__ = ["evaluate"]
