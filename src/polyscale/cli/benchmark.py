"""`polyscale benchmark`."""

import json
from typing import Annotated

import typer

from .arguments import parse_size, split_list


def benchmark(
    model: Annotated[str, typer.Argument(help="Bundled checkpoint, local folder or hub name.")] = "flexivit-cifar10",
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N|HxW ...", help="Patch sizes of FlexiViT, token counts of Quadtree ViT."),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Pixels; the model's own by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a forward pass.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Timed passes a budget; the median counts.", min=1)] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; chosen when not given.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run in bfloat16.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
) -> None:
    """Time a model on random pictures at several token budgets, alternating between them."""
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    from ..checkpoints import resolve_checkpoint
    from ..evaluation.speed import benchmark_budgets
    from ..layers.token_budget import format_budget

    logging.disable_progress_bar()
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        network = AutoModelForImageClassification.from_pretrained(resolve_checkpoint(model)).eval()
        network.to(device=device, dtype=torch.bfloat16 if bf16 else None)
        results = benchmark_budgets(
            network,
            budgets and [parse_size(value) for value in split_list(budgets)],
            image_size=image_size and parse_size(image_size),
            batch_size=batch_size,
            rounds=rounds,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"polyscale benchmark: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2))
        return
    table = Table(title=f"{model}, batch {batch_size}, {network.device.type}, {str(network.dtype).split('.')[-1]}")
    for name in ("budget", "tokens", "ms a batch", "images/s", "speed-up"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            format_budget(result.budget),
            str(result.tokens),
            f"{result.milliseconds:.1f}",
            f"{result.images_per_second:.1f}",
            f"{result.speedup:.2f}",
        )
    Console().print(table)


__all__ = ["benchmark"]
