"""`polyscale benchmark`."""

import json
from typing import Annotated

import typer

from .arguments import (
    DEFAULT_MODEL,
    Budgets,
    Device,
    ImageSize,
    NumTokens,
    PatchSizes,
    TrustRemoteCode,
    budget_words,
    parse_size,
)
from .printing import quiet, reporting


def benchmark(
    model: Annotated[str, typer.Argument(help="Bundled checkpoint, local folder or hub name.")] = DEFAULT_MODEL,
    budgets: Budgets = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Timed passes per budget; the median counts.", min=1)] = 10,
    device: Device = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run in bfloat16.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Time a model on random images at several token budgets, alternating between them."""
    with reporting("benchmark"):
        from dataclasses import asdict

        import torch
        from rich.console import Console
        from rich.table import Table

        from polyscale.evaluation.speed import benchmark_budgets
        from polyscale.layers.token_budget import choose_budgets, format_budget
        from polyscale.loading import load_classifier
        from polyscale.utils.text import plain

        quiet()
        network, _ = load_classifier(
            model, device, dtype=torch.bfloat16 if bf16 else None, trust_remote_code=trust_remote_code
        )
        results = benchmark_budgets(
            network,
            choose_budgets(network.config, budget_words(budgets, patch_sizes, num_tokens)),
            image_size=image_size and parse_size(image_size, "--image-size"),
            batch_size=batch_size,
            rounds=rounds,
        )
        if as_json:
            typer.echo(json.dumps([asdict(result) for result in results], indent=2))
            return
        dtype = str(network.dtype).rpartition(".")[2]
        table = Table(title=plain(f"{model}, batch {batch_size}, {network.device.type}, {dtype}"))
        for name in ("budget", "tokens", "GFLOP/image", "ms per batch", "images/s", "speed-up"):
            table.add_column(name, justify="right")
        for result in results:
            table.add_row(
                format_budget(result.budget, network.config),
                str(result.tokens),
                f"{result.gflops:.3g}",
                f"{result.milliseconds:.1f}",
                f"{result.images_per_second:.1f}",
                f"{result.speedup:.2f}",
            )
        Console().print(table)


__all__ = ["benchmark"]
