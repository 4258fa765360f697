"""`polyscale explore`: a page in the browser with a slider for the token budget."""

from .exploring import Explorer, View


__all__ = ["Explorer", "View"]
