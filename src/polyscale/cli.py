"""The `polyscale` command, where it is asked for by its place in the package.

It is the package `polyscale_cli` beside this one, which only parses until a command runs: `polyscale --help` then need
not import what a model needs, as everything inside of `polyscale` does.
"""

from polyscale_cli import app, main


__all__ = ["app", "main"]
