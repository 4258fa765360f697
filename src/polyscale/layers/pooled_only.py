"""When a classifier needs no more of the model before its head than what the head pools."""

from transformers import PreTrainedModel


def pooled_only_suffices(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether a call of a classifier reads nothing but its pooled tokens, so that the last layer may leave the others
    out.

    So it is unless an output of the layers is asked for, in the call or by the config, or `config.keep_all_tokens` is
    on.

    Args:
        model (`PreTrainedModel`): the classifier; its `_can_record_outputs` are asked for by `output_...`.
        kwargs (`dict`): of the classifier's forward.
    """
    if model.config.keep_all_tokens:
        return False
    outputs = (f"output_{name}" for name in model._can_record_outputs or ("hidden_states", "attentions"))
    asked = (kwargs.get(name, getattr(model.config, name, False)) for name in outputs)
    return all(value is None or value is False for value in asked)


__all__ = ["pooled_only_suffices"]
