"""Models around another model: S2 around any vision model, the towers inside of LLaVA models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.vision_configs import model_classes_of
from .attention import attention_name, set_attention_name


# What a model around another one can do as far as the one inside can.
_FLAGS = (
    "supports_gradient_checkpointing",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
)


def check_has_no_head(model: PreTrainedModel, name: str) -> None:
    """Refuses anything but a model of a class that `AutoModel` gives for its config.

    Args:
        model (`PreTrainedModel`): what the user gave.
        name (`str`): of the argument.

    Raises:
        ValueError: for a model with a head, or what is no model.
    """
    expected = model_classes_of(getattr(model, "config", None))
    if type(model) not in expected:
        names = " or ".join(option.__name__ for option in expected) or "a model that AutoModel gives for its config"
        raise ValueError(
            f"`{name}` must be {names}, a model without a head, got {type(model).__name__}: its head gives "
            "no features. Give the model inside it, `.base_model`."
        )


def take_flags(outer: PreTrainedModel, inner_config: PreTrainedConfig) -> None:
    """Says on `outer` what the model inside it supports; to be called before `PreTrainedModel.__init__`.

    Args:
        outer (`PreTrainedModel`): the model around it.
        inner_config (`PreTrainedConfig`): of the model inside.
    """
    inner = next(iter(model_classes_of(inner_config)), None)
    for flag in _FLAGS:
        setattr(outer, flag, bool(getattr(inner, flag, False)))


@contextmanager
def attention_kept(*models: PreTrainedModel) -> Iterator[None]:
    """Gives the models their attention implementations back, which a config around theirs resets."""
    implementations = [attention_name(model.config) for model in models]
    try:
        yield
    finally:
        for model, implementation in zip(models, implementations, strict=True):
            set_attention_name(model.config, implementation)


def keep_weights(model: PreTrainedModel) -> None:
    """Keeps the weights of a model as they are when one around it is made: its `post_init` draws new ones where no
    module says that it has some. Private, and transformers has no public word for it.
    """
    for module in model.modules():
        module._is_hf_initialized = True


def wrap_in_memory(
    outer_class: type[PreTrainedModel],
    model: PreTrainedModel,
    make_config: Callable[[PreTrainedConfig], PreTrainedConfig],
) -> PreTrainedModel:
    """A model around one in memory; the weights are shared and stay as they are.

    Args:
        outer_class (`type`): of the result; it is called with the config and the model.
        model (`PreTrainedModel`): the model inside.
        make_config (`Callable`): gives the config of the result for that of `model`.
    """
    with attention_kept(model):
        config = make_config(model.config)
    set_attention_name(config, attention_name(model.config))
    config.dtype = model.dtype
    keep_weights(model)
    return outer_class(config, model)


__all__ = ["attention_kept", "check_has_no_head", "keep_weights", "take_flags", "wrap_in_memory"]
