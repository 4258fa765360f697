"""What every model's `forward` refuses before it computes: words that are not its own, labels that do not fit."""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils.validation import closest_name
from .token_budget import registered_budget_words
from .token_merging import MERGING_WORD


# What hosts and tools of transformers hand to any model: never a misspelling, whatever it looks like.
_HOST_WORDS = frozenset(
    {
        *("attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "image_sizes", "input_ids"),
        *("interpolate_pos_encoding", "max_length_k", "max_length_q", "num_items_in_batch", "output_attentions"),
        *("output_hidden_states", "position_ids", "return_dict", "token_type_ids", "use_cache"),
    }
)

_INNER_WORD = "pooled_only"  # an argument of models without a head alone


@lru_cache(maxsize=1024)
def _arguments(model_class: type) -> tuple[str, ...]:
    """Names of what the `forward` of a class takes, and of the outputs that it records when asked to."""
    named = [
        parameter.name
        for parameter in inspect.signature(model_class.forward).parameters.values()
        if parameter.name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return (*named, *(f"output_{name}" for name in getattr(model_class, "_can_record_outputs", None) or ()))


@lru_cache(maxsize=1024)
def _nearest_argument(word: str, arguments: tuple[str, ...]) -> str | None:
    return closest_name(word, arguments)


@torch.compiler.assume_constant_result
def _complaint(word: str, model_classes: tuple[type, ...]) -> str | None:
    """What is wrong with a keyword argument, for models of these classes that are handed it; `None` for nothing."""
    own = tuple(dict.fromkeys(name for model_class in model_classes for name in _arguments(model_class)))
    if word == _INNER_WORD:  # also where a receiver takes it
        return (
            f"`{word}` is no argument of {model_classes[0].__name__}, which gives it to the model inside where its "
            "head allows."
        )
    if word in own or word in _HOST_WORDS:
        return None
    budgets = registered_budget_words()
    name = model_classes[0].__name__
    mine = [argument for argument in own if argument in budgets]
    choice = (
        f"its budget is set by {' or '.join(f'`{argument}`' for argument in mine)}"
        if mine
        else "it has no budget to set"
    )
    if word in budgets:
        return f"`{word}` is no argument of {name}: {choice}."
    if word == MERGING_WORD:
        return f"`{word}` is no argument of {name}: it merges no tokens."
    nearest = _nearest_argument(word, own)
    if nearest is not None:
        return f"`{word}` is no argument of {name}. Did you mean `{nearest}`?"
    nearest = _nearest_argument(word, tuple(sorted(budgets)))
    return None if nearest is None else f"`{word}` is no argument of {name}, nor is `{nearest}`: {choice}."


class CheckedModelMixin:
    """Goes first among the bases of a family's `PreTrainedModel`.

    Attributes:
        old_names (`dict[str, str]`): names of tensors in checkpoints of older versions, as patterns -> today's.

    Raises:
        ValueError: where the fields of the config, which may have been changed since it was made, do not fit together.
    """

    old_names: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        config.check_fit()
        super().__init__(config, *args, **kwargs)

    def num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int | None:
        """How many tokens an image costs: see `num_tokens_for` of its config."""
        return self.config.num_tokens_for(image_size, **budget)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers; tensors with names of older versions are read under today's."""
        if cls.old_names:
            kwargs["key_mapping"] = {**cls.old_names, **(kwargs.get("key_mapping") or {})}
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


def check_words(model: nn.Module, kwargs: dict, *receivers: nn.Module) -> None:
    """Refuses the budget words of other families, and near misses of the model's own arguments; token merging and
    `pooled_only` too, where there is none.

    Every other word passes: hosts hand their models much that a vision model does not need.

    Args:
        model (`nn.Module`): whose `forward` was called.
        kwargs (`dict`): the keyword arguments that it does not name.
        receivers (`nn.Module`, *optional*): further models that are handed `kwargs`, whose arguments are legal too.

    Raises:
        ValueError: naming the word, and what was meant.
    """
    if not kwargs:
        return
    classes = (type(model), *(type(receiver) for receiver in receivers))
    for word in kwargs:
        complaint = _complaint(word, classes)
        if complaint is not None:
            raise ValueError(complaint)


def classification_loss(
    model: nn.Module, labels: torch.Tensor | None, logits: torch.Tensor, config: PreTrainedConfig, kwargs: dict
) -> torch.Tensor | None:
    """The loss of a classifier, `None` without labels.

    Args:
        model (`PreTrainedModel`): its `loss_function` is called.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*): class indices, or targets.
        logits (`torch.Tensor` of shape `(batch, num_labels)`).
        config (`PreTrainedConfig`): of the model.
        kwargs (`dict`): further arguments of the loss function.

    Raises:
        ValueError: for labels of another type or shape, or, on a CPU, out of range. They leave `config.problem_type`,
            which transformers sets by the labels of the first call, as it was.
    """
    if labels is None:
        return None
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor of shape (batch,), got a {type(labels).__name__}.")
    if labels.ndim == 0 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"`labels` must have one entry for each of the {logits.shape[0]} inputs, got the shape "
            f"{tuple(labels.shape)}."
        )
    problem = config.problem_type
    is_alone = config.num_labels == 1  # one number for each input, with or without an axis of its own
    if problem == "regression" or (problem is None and is_alone):
        fits = labels.numel() == logits.numel() if is_alone else labels.shape == logits.shape
        if not fits:  # torch would compare each with each
            raise ValueError(
                f"`labels` must hold one number for each logit in a regression, {tuple(logits.shape)}, got the shape "
                f"{tuple(labels.shape)}."
            )
    try:
        return model.loss_function(labels, logits, config, **kwargs)
    except (IndexError, RuntimeError, ValueError) as error:
        config.problem_type = problem
        if labels.device.type != "cpu":
            raise
        indices = f"class indices from 0 to {config.num_labels - 1}"
        expected = f"{indices}, or one target for each logit"
        if labels.shape == logits.shape and problem == "single_label_classification":
            expected = (
                f"{indices}, for `config.problem_type` is {problem!r} (labels of an earlier call may have set it); "
                "one target for each logit needs 'multi_label_classification'"
            )
        raise ValueError(
            f"`labels` of shape {tuple(labels.shape)} and {labels.dtype} do not fit `logits` of shape "
            f"{tuple(logits.shape)}: expected {expected}. ({error})"
        ) from error


__all__ = ["CheckedModelMixin", "check_words", "classification_loss"]
