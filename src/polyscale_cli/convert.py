"""`polyscale convert` and `polyscale convert-patch-embed`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_fields, parse_size, split_list
from .printing import no_bars, reporting


def convert(
    source: Annotated[str, typer.Argument(help="Folder, file, hub name, timm name, or released npz name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="Family of the result: flexivit (unless SOURCE is a LLaVA or VILA), quadtree_vit, sparseformer, "
            "sparseformer_video, s2_vision; llava for a whole LLaVA or VILA; vit or timm for a plain ViT."
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="timm's name of the model, where SOURCE is a bare weights file.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=JSON", help="Field of the model's config; repeat.")
    ] = None,
    replicates: Annotated[
        int | None, typer.Option(help="To sparseformer_video: times that each token is repeated along time.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="N|HEIGHTxWIDTH", help="To vit or timm: pixels of the images.")
    ] = None,
    patch_size: Annotated[
        str | None, typer.Option(metavar="N|HEIGHTxWIDTH", help="To vit or timm: pixels of a patch.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Turn a checkpoint of transformers, timm or the authors into one of polyscale, or a FlexiViT into a plain ViT."""
    options = parse_fields(set_)
    for name in ("source", "out", "to", "overwrite"):
        if name in options:
            raise typer.BadParameter(f"{name} is no field of a config", param_hint="--set")
    for name, value in (("image_size", image_size), ("patch_size", patch_size)):
        if value is not None:
            options[name] = parse_size(value, f"--{name.replace('_', '-')}")
    if architecture is not None:
        options["architecture"] = architecture
    if replicates is not None:
        options["replicates"] = replicates

    with reporting("convert"):
        from polyscale.conversion import convert_checkpoint

        no_bars()
        typer.echo(f"Wrote {convert_checkpoint(source, out, to, overwrite=overwrite, **options)}")


def convert_patch_embed(
    input: Annotated[Path, typer.Argument(metavar="IN", help="Weights: .safetensors, .pt or .pth.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, of the same kind.")],
    patch_size: Annotated[
        str, typer.Option(metavar="N|HEIGHT WIDTH ...", help="Size of the new kernel, one number or two.")
    ],
    name: Annotated[str, typer.Option(help="Name of the patch kernel in IN.")] = "patch_embed.proj.weight",
    interpolation: Annotated[str, typer.Option(help="bicubic or bilinear.")] = "bicubic",
    antialias: Annotated[bool, typer.Option("--antialias/--no-antialias", help="Of the image resize.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Resize the patch kernel in a weights file by PI-resize."""
    with reporting("convert-patch-embed"):
        from polyscale.conversion import convert_patch_embed as run

        sizes = [parse_size(size, "--patch-size") for size in split_list(patch_size)]
        size = sizes[0] if len(sizes) == 1 else sizes
        old_shape, new_shape = run(
            input, output, name, size, interpolation=interpolation, antialias=antialias, overwrite=overwrite
        )
        typer.echo(f"{name}: {old_shape} -> {new_shape}")
        typer.echo(f"Wrote {output}")


__all__ = ["convert", "convert_patch_embed"]
