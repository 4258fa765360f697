"""`polyscale show`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    DEFAULT_MODEL,
    Budgets,
    Device,
    ImageSize,
    Model,
    NumTokens,
    PatchSizes,
    TrustRemoteCode,
    budget_words,
    parse_size,
)
from .printing import quiet, reporting


def show(
    file: Annotated[Path | None, typer.Argument(help="An image; a sample photograph when not given.")] = None,
    model: Model = DEFAULT_MODEL,
    budgets: Budgets = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    output: Annotated[Path, typer.Option(help="The image file to write.")] = Path("polyscale.png"),
    image_size: ImageSize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw what a model looks at in an image, at several token budgets."""
    with reporting("show"):
        from polyscale.assets import sample_photographs
        from polyscale.figures import check_image_output
        from polyscale.figures import show as draw
        from polyscale.layers.token_budget import choose_budgets
        from polyscale.loading import load_config
        from polyscale.utils.outputs import written_beside

        quiet()
        check_image_output(output)
        config = load_config(model, trust_remote_code=trust_remote_code)
        drawn = draw(
            model,
            file or sample_photographs((config.id2label or {}).values())[0],
            choose_budgets(config, budget_words(budgets, patch_sizes, num_tokens)),
            device=device,
            image_size=image_size and parse_size(image_size, "--image-size"),
            trust_remote_code=trust_remote_code,
        )
        with written_beside(output) as scratch:
            drawn.save(scratch)
        typer.echo(f"Wrote {output}")


__all__ = ["show"]
