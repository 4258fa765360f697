"""Moving weights from one naming to another, with nothing lost on the way."""

import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig, PreTrainedModel


_SHOWN = 8  # names in an error message; a wrong layout would print hundreds


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def rename_keys(
    state_dict: dict[str, torch.Tensor], rules: Iterable[tuple[str, str | None]], source: str
) -> dict[str, torch.Tensor]:
    """Each name replaced by the first rule that matches all of it; a rule with None drops the tensor.

    Args:
        state_dict: names and tensors.
        rules: (regular expression, replacement) pairs.
        source: what the tensors come from, for the error.

    Raises:
        ValueError: if some name fits no rule.
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            match = pattern.fullmatch(name)
            if match:
                if replacement is not None:
                    renamed[match.expand(replacement)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{source} holds tensors of an unknown layout, which would be lost: {_listing(unknown)}.")
    return renamed


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights (on torch's meta device)."""
    with torch.device("meta"):
        return model_class(config)


def check_state_dict(state_dict: dict[str, torch.Tensor], model: torch.nn.Module, source: str) -> None:
    """Compares the tensors with those that `model` wants.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    problems = []
    if missing := wanted.keys() - state_dict.keys():
        problems.append(f"missing: {_listing(missing)}")
    if unexpected := state_dict.keys() - wanted.keys():
        problems.append(f"unexpected: {_listing(unexpected)}")
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state_dict.keys()
        if state_dict[name].shape != wanted[name].shape
    ]
    if misshapen:
        problems.append(f"other shapes: {_listing(misshapen)}")
    if problems:
        raise ValueError(f"The tensors of {source} do not fit: {'; '.join(problems)}.")


def model_from_state_dict(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state_dict: dict[str, torch.Tensor], source: str
) -> PreTrainedModel:
    """A model in evaluation mode that holds these tensors, without a random initialisation on the way.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another shape.
    """
    model = empty_model(model_class, config)
    check_state_dict(state_dict, model, source)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


__all__ = ["check_state_dict", "empty_model", "model_from_state_dict", "rename_keys"]
