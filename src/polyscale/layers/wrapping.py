"""Models around another model: S2 around any vision model, the towers inside of LLaVA models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.validation import shown
from ..utils.vision_configs import model_classes_of
from .attention import attention_name, set_attention_name


# What a model around another one can do where the one inside can.
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
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`{name}` must be a vision model without a head, as `AutoModel.from_pretrained` gives it, got "
            f"{shown(model)}."
        )
    expected = model_classes_of(model.config)
    if type(model) not in expected:
        names = " or ".join(option.__name__ for option in expected) or "a model that AutoModel gives for its config"
        raise ValueError(
            f"`{name}` must be {names}, a model without a head, got {type(model).__name__}: its head gives "
            "no features. Give the model inside it, `.base_model`."
        )


class OuterModelMixin:
    """Flags of a model around another one, whose config is `config.vision_config`. Goes before `PreTrainedModel`.

    The class says what it can do around the best of models, each instance what the model inside it can.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        inner = next(iter(model_classes_of(config.vision_config)), None)
        for flag in _FLAGS:  # before transformers reads them
            setattr(self, flag, bool(getattr(inner, flag, False)))
        super().__init__(config, *args, **kwargs)


def _with_inner(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it, the outer ones first."""
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            yield from _with_inner(getattr(config, name))


@contextmanager
def attention_kept(*models: PreTrainedModel) -> Iterator[None]:
    """Puts the attention implementations of models, and of those inside them, back at the end: making a config around
    theirs resets them.
    """
    kept = [(config, attention_name(config)) for model in models for config in _with_inner(model.config)]
    try:
        yield
    finally:
        for config, implementation in kept:  # an outer one sets those inside it, which follow
            set_attention_name(config, implementation)


def keep_weights(model: PreTrainedModel) -> None:
    """Marks the weights of a model as made: the `post_init` of a model around it draws those of all other modules.

    The mark is private, and transformers has no public way to set it.
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
    attention = attention_name(model.config)
    with attention_kept(model):
        config = make_config(model.config)
        set_attention_name(config, attention)
        config.dtype = model.dtype
        keep_weights(model)
        return outer_class(config, model)


__all__ = ["OuterModelMixin", "attention_kept", "check_has_no_head", "keep_weights", "wrap_in_memory"]
