"""Names of transformers that are no part of its documented interface, and that every model of it is written with.

They are imported here and nowhere else: where a version of transformers moves one, this file follows.
"""

from transformers import AutoConfig
from transformers.backbone_utils import filter_output_hidden_states
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


def sub_config(model_type: str, *, optional: bool = False) -> SubConfigSpec:
    """An entry of `sub_configs_defaults`: a config of any type inside a config.

    Args:
        model_type (`str`): of the config that is made where none is given.
        optional (`bool`, *optional*, defaults to `False`): whether none is made then.
    """
    return SubConfigSpec(config_class=AutoConfig, model_type=model_type, optional=optional)


__all__ = [
    "OutputRecorder",
    "capture_outputs",
    "filter_output_hidden_states",
    "maybe_autocast",
    "merge_with_config_defaults",
    "sub_config",
]
