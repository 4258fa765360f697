"""`polyscale explore`."""

from typing import Annotated

import typer

from .arguments import Device
from .printing import quiet, reporting


def explore(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Local folders or hub names to choose from, beside the bundled checkpoints."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="The first free port from 7860 on when not given.", min=1, max=65535)
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    device: Device = None,
) -> None:
    """Open a page in the browser with a slider for the token budget. Needs gradio, of the extra `app`."""
    with reporting("explore"):
        from importlib.util import find_spec

        gradio = find_spec("gradio")
        if gradio is None or gradio.origin is None:  # a folder of that name is found too
            raise ImportError("gradio is not installed: pip install 'polyscale[app]'.")

        from polyscale.explorer import Explorer
        from polyscale.explorer.page import build_page, launch_options

        quiet()
        page = build_page(Explorer(models or [], device))
        options = launch_options(host, port) | {"inbrowser": browser, "prevent_thread_lock": True, "quiet": True}
        _, url, _ = page.launch(**options)
        typer.echo(f"The explorer is at {url} - Ctrl-C ends it.")
        page.block_thread()


__all__ = ["explore"]
