"""What a call wants of a model besides its result: when a classifier needs no more than what its head pools."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.validation import check_int


def is_output_wanted(name: str, config: PreTrainedConfig, kwargs: Mapping[str, object]) -> bool:
    """Whether a call asks for an output of the layers, or the config does for all calls.

    Args:
        name (`str`): of the argument, and of the config field: "output_attentions", "output_hidden_states", ...
        config (`PreTrainedConfig`): of the model.
        kwargs (`Mapping[str, object]`): of the call.
    """
    wanted = kwargs.get(name, getattr(config, name, False))
    return wanted is not None and wanted is not False


def layers_wanted(output_hidden_states: bool | int | Sequence[int] | None) -> bool | list[int] | None:
    """`output_hidden_states` of a model that takes indices of layers: these as a list, for the index 0 is as good as
    False to the model inside.

    Raises:
        ValueError: for anything but True, False, an index or a list of indices.
    """
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return output_hidden_states
    is_list = isinstance(output_hidden_states, (list, tuple))  # torch 2.8 cannot compile `list | tuple`
    layers = output_hidden_states if is_list else [output_hidden_states]
    return [check_int("output_hidden_states", layer) for layer in layers]


def pooled_only_suffices(model: PreTrainedModel, kwargs: Mapping[str, object]) -> bool:
    """Whether a call of a classifier reads nothing but its pooled tokens, so that the last layer may leave the others
    out.

    So it is unless an output of the layers is wanted, or `config.keep_all_tokens` is on.

    Args:
        model (`PreTrainedModel`): the classifier; its `_can_record_outputs` are asked for by `output_...`.
        kwargs (`Mapping[str, object]`): of the classifier's forward.
    """
    if model.config.keep_all_tokens:
        return False
    names = model._can_record_outputs or ("hidden_states", "attentions")
    return not any(is_output_wanted(f"output_{name}", model.config, kwargs) for name in names)


__all__ = ["is_output_wanted", "layers_wanted", "pooled_only_suffices"]
