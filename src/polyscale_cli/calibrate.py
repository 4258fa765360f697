"""`polyscale calibrate`."""

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
from .printing import note, progress_bar, quiet, reporting


def calibrate(
    files: Annotated[list[Path], typer.Argument(help="Image files and folders; no labels are needed.")],
    output: Annotated[Path, typer.Option(help="File for the policy, JSON; `polyscale classify --policy` reads it.")],
    model: Model = DEFAULT_MODEL,
    agreement: Annotated[
        float, typer.Option(help="Share of the images that must get the label of the full budget.")
    ] = 0.98,
    budgets: Budgets = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the model.", min=1)] = 1,
    image_size: ImageSize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find when a small token budget suffices: a policy for `polyscale classify --policy`."""
    with reporting("calibrate"):
        from polyscale.budget_policy import calibrate_policy
        from polyscale.layers.token_budget import choose_budgets, format_budget
        from polyscale.loading import load_classifier
        from polyscale.utils.outputs import check_output

        quiet()
        check_output(output)
        loaded = load_classifier(
            model,
            device,
            image_size=image_size and parse_size(image_size, "--image-size"),
            trust_remote_code=trust_remote_code,
        )
        config = loaded.model.config
        with progress_bar("Calibrating") as progress:
            policy = calibrate_policy(
                files,
                loaded,
                choose_budgets(config, budget_words(budgets, patch_sizes, num_tokens)),
                agreement=agreement,
                batch_size=batch_size,
                progress=progress,
            )
        policy.save(output)
        *tried, last = [f"{policy.budget_argument} {format_budget(budget, config)}" for budget in policy.budgets]
        for budget, margin in zip(tried, policy.margins, strict=True):
            typer.echo(f"{budget}: taken from a margin of {margin:.3f}")
        typer.echo(f"{last}: else")
        typer.echo(
            f"On {policy.images} images: {policy.mean_tokens:.1f} tokens per image, {policy.full_tokens:.1f} at the "
            f"full budget; {policy.agreement:.1%} with its label. Wrote {output}"
        )
        if policy.images < 100:
            note("calibrate", f"{policy.images} images are few: the agreement on others may differ much.")


__all__ = ["calibrate"]
