"""What the configs of all families share: names and values are checked when a config is made and when it is changed.

A field's type and choices stand in its annotation, its range in the function that makes it (`positive`, `rate`, ...).
Rules that hold between fields are methods `validate_...`: transformers runs them when a config is made and when it is
saved, our models when they are made. They do not run on assignment: two fields are changed one after the other.
"""

import math
from collections.abc import Collection
from dataclasses import fields
from functools import lru_cache, wraps
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.generation.configuration_utils import GenerationConfig
from transformers.utils import logging

from ..utils.validation import closest_name, to_pair


logger = logging.get_logger(__name__)

# What transformers and its tools write on a config, whatever model it is of.
_NAMES_OF_TRANSFORMERS = {
    *(field.name for field in fields(PreTrainedConfig)),
    *(name for name, value in vars(PreTrainedConfig).items() if isinstance(value, property) and value.fset),
    *GenerationConfig().to_dict(),
    *("attn_implementation", "experts_implementation", "per_layer_config", "model_type", "_auto_class"),
    *("auto_map", "custom_pipelines", "distributed_config", "gradient_checkpointing", "is_decoder", "loss_type"),
    *("quantization_config", "pruned_heads", "task_specific_params", "tie_word_embeddings", "torchscript"),
    *("transformers_weights", "use_cache", "out_features", "out_indices", "stage_names"),
    *("base_model_tp_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_ep_plan"),
}
# What transformers' common test suite and peft also assign, to any config, whether it has such a field or not. A list,
# as these are fields of single configs of transformers, which nothing of it declares together; a name that a later
# version of the suite assigns fails in a test here, and its error says which name it is.
_ASSIGNED_NAMES = {
    *("batch_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "post_norm_eps"),
    *("rms_norm_eps", "attention_dropout", "dropout_rate", "ffn_hidden_size", "first_k_dense_replace", "head_dim"),
    *("layer_types", "mlp_only_layers", "moe_intermediate_size", "moe_layer_start_index", "num_dense_layers"),
    *("num_key_value_heads", "sliding_window", "use_sliding_window", "vocab_size", "vocab_size_per_layer_input"),
    "base_model_name_or_path",
}
# These (and the field `transformers_version`) are in dictionaries that `to_dict` writes, not in what a user types.
_MARKS_OF_A_FILE = ("model_type", "_name_or_path")
_MOST = 1 << 20  # of anything that is counted: more is a slip, or an attempt to fill the memory
# What a field may hold; transformers does not check the fields that it declares itself.
_PLAIN = (type(None), bool, int, float, str, list, tuple, dict, PreTrainedConfig, torch.dtype)
_PAIR = tuple[int, int]
_WORDS = {int: "an int", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


class ConfigError(StrictDataclassFieldValidationError, StrictDataclassClassValidationError, ValueError):
    """A name or a value that a config does not take: a ValueError, and what transformers' strict configs raise."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


@lru_cache(maxsize=256)
def field_names(config_class: type[PreTrainedConfig]) -> tuple[str, ...]:
    """The names of the fields of a config, those of transformers among them."""
    return tuple(field.name for field in fields(config_class))


def _expectation(annotation: Any) -> str:
    """A field's annotation in words: `int | None` -> "an int or None"."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
        kinds = [part for part in parts if not (part is int and float in parts)]
        if _PAIR in kinds:  # which a file holds as a list
            kinds = [part for part in kinds if part != list[int]]
        return " or ".join(dict.fromkeys(map(_expectation, kinds)))
    if annotation == _PAIR:
        return "a pair of ints"
    kind = get_origin(annotation) or annotation
    if kind in (list, tuple):
        return "a list"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _field_error(config: PreTrainedConfig, name: str, value: Any, cause: BaseException | None) -> ConfigError:
    if isinstance(cause, TypeError):  # of the type check
        expected = _expectation(next(entry.type for entry in fields(config) if entry.name == name))
        return ConfigError(f"`{name}` must be {expected}, got {value!r}.")
    return ConfigError(f"`{name}` {cause}")


def _not_plain(name: str, value: Any) -> ConfigError:
    return ConfigError(f"`{name}` must be a plain value, which JSON can hold, got {value!r:.80}.")


def checked_config(cls: type) -> type:
    """Class decorator of every config: `huggingface_hub.dataclasses.strict`, whose errors are ValueErrors too.

    Renamed fields (`attribute_map`: old name -> new name) are taken by either name.
    """
    cls = strict(cls)
    strict_setattr, strict_init, strict_validate = cls.__setattr__, cls.__init__, cls.validate

    @wraps(strict_setattr)
    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        is_field = name in field_names(type(self))
        if isinstance(value, bytes | np.ndarray | torch.Tensor) or (is_field and not isinstance(value, _PLAIN)):
            raise _not_plain(name, value)
        try:
            strict_setattr(self, name, value)
        except ConfigError:
            raise
        except StrictDataclassError as error:
            raise _field_error(self, name, value, error.__cause__) from error

    @wraps(strict_init)
    def __init__(self, /, *args, **kwargs) -> None:
        if "self" in kwargs:
            raise ConfigError(f"{type(self).__name__} has no field `self`.")
        new_names = type(self).attribute_map
        old_names = {new: old for old, new in new_names.items() if old in kwargs}
        try:
            strict_init(self, *args, **{new_names.get(name, name): value for name, value in kwargs.items()})
        except ConfigError as error:
            message = str(error)
            for new, old in old_names.items():
                message = message.replace(f"`{new}`", f"`{new}` (`{old}`)")
            raise ConfigError(message) from error.__cause__
        except StrictDataclassError as error:
            raise ConfigError(f"A config inside {type(self).__name__}: {error.__cause__ or error}.") from error

    @wraps(strict_validate)
    def validate(self) -> None:
        try:
            strict_validate(self)
        except StrictDataclassError as error:
            raise ConfigError(str(error.__cause__ or error)) from error

    cls.__setattr__, cls.__init__, cls.validate = __setattr__, __init__, validate
    return cls


class CheckedConfigMixin:
    """Refuses names that are no fields, and values that no field takes. Goes first among the bases of a config.

    In the constructor and on assignment an unknown name is an error, which names the nearest field. Names out of a
    file (`from_dict`, `from_pretrained`, and dictionaries that `to_dict` made) are kept, with a warning where one is
    close to a field: they are attributes of the user, or fields of another version.

    Names that begin with an underscore, and those that transformers writes on any config, are always taken.

    Raises:
        ConfigError: for an unknown name or an illegal value; it is a `ValueError`.
    """

    def __post_init__(self, **kwargs):
        is_from_file = self.transformers_version is not None or any(name in kwargs for name in _MARKS_OF_A_FILE)
        kept = {name: kwargs.pop(name) for name in list(kwargs) if not self._takes(name)}
        for name in kept:
            if not is_from_file:
                raise self._name_error(name)
            if not _is_json(kept[name]):
                raise _not_plain(name, kept[name])
            nearest = self._nearest_field(name)
            if nearest is not None:
                logger.warning(
                    f"`{name}` is no field of {type(self).__name__}; it is kept and changes nothing. Did you mean "
                    f"`{nearest}`?"
                )
        super().__post_init__(**kwargs)
        # What a property answers for cannot be set; a file of another version may name it.
        self.__dict__.update({name: value for name, value in kept.items() if not hasattr(type(self), name)})

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._takes(name) and name not in _ASSIGNED_NAMES and not name.endswith("_token_id"):
            raise self._name_error(name)
        if not _is_finite(value):
            raise ConfigError(f"`{name}` must be finite, got {value!r}.")
        check = _CHECKS_OF_TRANSFORMERS.get(name)
        if check is not None and value is not None:
            check(value)
        super().__setattr__(name, value)

    def check_fit(self) -> None:
        """Raises ConfigError where fields of this family do not fit together, such as after several assignments."""
        for check in type(self).__class_validators__:
            if not hasattr(PreTrainedConfig, check.__name__):
                try:
                    check(self)
                except (TypeError, ValueError) as error:
                    raise ConfigError(str(error)) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers. Names in `config_dict` are taken as those of a file; those in `kwargs` as typed.

        Raises:
            ConfigError: for a name in `kwargs` that is close to a field and none, or an illegal value.
        """
        for name in kwargs:
            nearest = cls._nearest_field(name)
            if nearest is not None and name not in config_dict and not cls._is_known(name):
                raise ConfigError(f"{cls.__name__} has no field `{name}`. Did you mean `{nearest}`?")
        return super().from_dict({"model_type": cls.model_type, **config_dict}, **kwargs)

    @classmethod
    def _is_known(cls, name: str) -> bool:
        attribute = getattr(cls, name, None)
        if isinstance(attribute, property):
            return attribute.fset is not None
        is_own = name in cls.attribute_map or name in field_names(cls)
        is_private = name.startswith("_") and not name.startswith("__")
        return is_own or name in _NAMES_OF_TRANSFORMERS or is_private

    def _takes(self, name: str) -> bool:
        return self._is_known(name) or name in self.__dict__

    @classmethod
    def _nearest_field(cls, name: str) -> str | None:
        return closest_name(name, [field for field in field_names(cls) if not field.startswith("_")])

    def _name_error(self, name: str) -> ConfigError:
        if hasattr(type(self), name):
            reason = getattr(self, "fixed_fields", {}).get(name)
            return ConfigError(
                f"`{name}` of {type(self).__name__} follows from its other fields and cannot be set"
                f"{'' if reason is None else f': {reason}'}."
            )
        nearest = self._nearest_field(name)
        hint = f"Did you mean `{nearest}`?" if nearest else f"Its fields: {', '.join(self._own_fields())}."
        return ConfigError(f"{type(self).__name__} has no field `{name}`. {hint}")

    @classmethod
    def _own_fields(cls) -> list[str]:
        inherited = field_names(PreTrainedConfig)
        return [name for name in field_names(cls) if name not in inherited and not name.startswith("_")]


def _is_finite(value: Any) -> bool:
    """Whether no number in `value`, or in the lists and tuples inside it, is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def _is_json(value: Any) -> bool:
    """Whether a value, and all that is in it, can be written to a config file and read again."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_json(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, _PLAIN) and _is_finite(value)


def _check_num_labels(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ConfigError(f"`num_labels` must be an int of at least 0 and at most {_MOST}, got {value!r}.")


def _check_dtype(value: Any) -> None:
    if not isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype):
        raise ConfigError(f'`dtype` must be a torch.dtype or the name of one, such as "bfloat16", got {value!r}.')


def _check_id2label(value: Any) -> None:
    if not isinstance(value, dict) or not all(str(key).lstrip("-").isdigit() for key in value):
        raise ConfigError(f"`id2label` must be a dict from class indices to names, got {value!r}.")


# Fields of `PreTrainedConfig` that take any value there, and fail later.
_CHECKS_OF_TRANSFORMERS = {"num_labels": _check_num_labels, "dtype": _check_dtype, "id2label": _check_id2label}


def _check_above_zero(value: Any) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"must be above 0, got {value!r}.")


def _check_rate(value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"must be in [0, 1), got {value!r}.")


def _check_activation(value: Any) -> None:
    if value not in ACT2FN:
        raise ValueError(f"must be an activation that transformers knows, got {value!r}.")


def _check_size(value: Any) -> None:
    if value is not None:
        try:
            to_pair(value)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("`size` ")) from None


def at_least(minimum: int, default: int | None, reason: str | None = None) -> Any:
    """A field for numbers of at least `minimum`; the error names the reason, if there is one to name."""

    def check(value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must be finite, got {value!r}.")
        if value is not None and value < minimum:
            raise ValueError(f"must be at least {minimum}, got {value!r}{'' if reason is None else f': {reason}'}.")
        if value is not None and value > _MOST:
            raise ValueError(f"must be at most {_MOST}, got {value!r}.")

    return validated_field(check, default=default)


def positive(default: int | None) -> Any:
    """A field for ints of at least 1."""
    return at_least(1, default)


def non_negative(default: float | None) -> Any:
    """A field for numbers of at least 0."""
    return at_least(0, default)


def above_zero(default: float | None) -> Any:
    """A field for numbers above 0."""
    return validated_field(_check_above_zero, default=default)


def rate(default: float) -> Any:
    """A field for numbers in [0, 1): shares that are dropped."""
    return validated_field(_check_rate, default=default)


def activation(default: str) -> Any:
    """A field for names of activations."""
    return validated_field(_check_activation, default=default)


def choice(choices: Collection[str], default: str, hint: str | None = None) -> Any:
    """A field for names out of a collection that other code reads too, or adds to; errors end with the hint."""

    def check(value: Any) -> None:
        if value not in choices:
            more = "" if hint is None else f": {hint}"
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, got {value!r}{more}.")

    return validated_field(check, default=default)


def pixel_size(default: int | None) -> Any:
    """A field for sizes: an int, or (height, width), in pixels."""
    return validated_field(_check_size, default=default)


__all__ = [
    "CheckedConfigMixin",
    "ConfigError",
    "above_zero",
    "activation",
    "at_least",
    "checked_config",
    "choice",
    "field_names",
    "non_negative",
    "positive",
    "rate",
    "pixel_size",
]
