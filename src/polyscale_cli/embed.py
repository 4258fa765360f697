"""`polyscale embed`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import DEFAULT_MODEL, Device, Model, TrustRemoteCode
from .printing import note, quiet, reporting
from .wording import printable


def embed(
    images: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder for the parquet files; a killed run goes on there.")],
    model: Model = DEFAULT_MODEL,
    budget: Annotated[
        str | None, typer.Option(help="One budget, as the model's family has them; its own by default.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="The tokens of each image, not one pooled vector.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    shard_size: Annotated[int, typer.Option(help="Images per file.", min=1)] = 4096,
    num_workers: Annotated[int, typer.Option(help="Threads that open and resize images.", min=1)] = 2,
    search: Annotated[
        str | None,
        typer.Option(metavar="IMAGE|TEXT", help="Print the nearest images; by words where the model is CLIP-like."),
    ] = None,
    top: Annotated[int, typer.Option(help="To --search: how many images.", min=1)] = 5,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Embed many images into sharded parquet files, at one token budget.

    With --search also find images in it.

    On several processes: torchrun --nproc-per-node 2 -m polyscale embed ..., or accelerate launch -m polyscale ...
    """
    with reporting("embed", left="the same command goes on where it stopped"):
        from rich.console import Console
        from rich.progress import Progress

        from polyscale.embedding import embed_images
        from polyscale.layers.token_budget import parse_budget
        from polyscale.loading import load_config

        quiet()
        config = load_config(model, trust_remote_code=trust_remote_code)
        chosen = None if budget is None else parse_budget(config, budget)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("embed", total=None)
            summary = embed_images(
                images,
                out,
                model,
                chosen,
                tokens=tokens,
                batch_size=batch_size,
                shard_size=shard_size,
                num_workers=num_workers,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        for entry in summary.damaged:
            note("embed", entry["error"])
        there = f", {summary.found} were there already" if summary.found else ""
        typer.echo(f"Embedded {summary.written} images into {out}{there}; {len(summary.damaged)} could not be read.")
        if not summary.written + summary.found:
            raise typer.Exit(1)
        if search is not None:
            _print_nearest(out, search, top, device, trust_remote_code)


def _print_nearest(out: Path, query: str, top: int, device: str | None, trust_remote_code: bool) -> None:
    """One line per image: the cosine and the file; on several processes the first prints, when all are done."""
    from accelerate import PartialState

    from polyscale.searching import search_embeddings

    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        for found in search_embeddings(out, query, top=top, device=device, trust_remote_code=trust_remote_code):
            typer.echo(f"{found.score:.4f}  {printable(found.file)}")


__all__ = ["embed"]
