"""Errors in the words of the command: functions name their arguments, and a user typed options."""

import re
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand


_CONTEXT: ContextVar[Any] = ContextVar("context", default=None)  # of the command that runs
_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")
# What functions call otherwise than the command: name of the argument -> name of the command's parameter, or the word
# that its help has for it.
_OTHER_NAMES = {
    "calibrate": {"path": "output"},
    "convert-patch-embed": {"new_patch_size": "patch_size"},
    "demo": {"models": "model"},
    "embed": {"budgets": "budget", "dataset": "images", "source": "images", "query": "search"},
    "evaluate": {"dataset": "DATASET", "merge_tokens_to": "merge_to", "model": "MODEL", "models": "MODEL"},
    "show": {"image": "file"},
    "train": {
        "image_mean": "mean",
        "image_std": "std",
        "model_options": "set_",
        "train_patch_size_probs": "patch_size_probs",
        "train_patch_sizes": "patch_sizes",
    },
}


class WordedCommand(TyperCommand):
    """A command whose parameters `as_typed` knows while it runs."""

    def invoke(self, ctx: Any) -> Any:
        token = _CONTEXT.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _CONTEXT.reset(token)


def printable(text: object) -> str:
    """Text in which control characters, as a file's name may hold them, do nothing to a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def _was_typed(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _words(ctx: Any) -> dict[str, str]:
    """For each argument of functions that a parameter of the command stands for, what the user knows it as.

    Not for fields of `--set`, which may have the name of an option; nor for hidden options that were not typed.
    """
    words = {}
    fields = {entry.partition("=")[0] for entry in ctx.params.get("set_") or ()}
    for parameter in ctx.command.params:
        options = [option for option in parameter.opts if option.startswith("--")]
        typed = _was_typed(ctx, parameter.name)
        if typed or not (parameter.name in fields or getattr(parameter, "hidden", False)):
            words[parameter.name] = options[0] if options else parameter.metavar or parameter.name.upper()
    others = _OTHER_NAMES.get(ctx.command.name, {})
    return {**words, **{name: words.get(own, own) for name, own in others.items() if name not in fields}}


def as_typed(text: object) -> str:
    """An error in which the arguments of functions are the options and arguments of the command that runs.

    "`budgets` is empty" -> "`--budgets` is empty"; "`augmentation='none'`" -> "`--augmentation none`".
    """
    ctx = _CONTEXT.get()
    if ctx is None:
        return str(text)
    words = _words(ctx)

    def replaced(match: re.Match) -> str:
        name, value = match.groups()
        if name not in words:
            return match[0]
        return f"`{words[name]}`" if value in (None, "True") else f"`{words[name]} {value.strip(chr(39))}`"

    text = _ARGUMENT.sub(replaced, str(text))
    return re.sub(r"(`--[\w-]+`)[:,]? \(\1\)", r"\1", text)  # where a function names the option too


__all__ = ["WordedCommand", "as_typed", "printable"]
