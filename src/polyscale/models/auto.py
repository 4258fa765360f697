"""The table of families. Each family registers itself at the end of its `__init__`; everything generic asks here.

A family of your own registers in the same way, from your own code: `tests/test_fifth_family.py` is an example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..layers.token_budget import add_budget_words


@dataclass(frozen=True)
class Family:
    """What one family consists of. Arguments: `register_family`.

    Functions may be given as "module:function", which is imported when it is first asked for.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    classifier_class: type[PreTrainedModel] | None = None
    video_classifier_class: type[PreTrainedModel] | None = None
    backbone_class: type[PreTrainedModel] | None = None
    image_processors: dict[str, type] = field(default_factory=dict)
    video_processor: type | None = None
    converter: Callable | str | None = None
    exporters: dict[str, Callable | str] = field(default_factory=dict)
    drawing: Callable | str | None = None
    budget_drawing: Callable | str | None = None
    training_callbacks: tuple[Callable | str, ...] = ()
    training_config: Callable | str | None = None
    projection_class: type[PreTrainedModel] | None = None

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    def function(self, part: str) -> Callable | None:
        """The function in the field `part` ("converter", "drawing", "training_config", ...), imported, or `None`."""
        return _imported(getattr(self, part))

    def exporter(self, to: str) -> Callable | None:
        """The function that writes models of this family as `to`, imported, or `None`."""
        return _imported(self.exporters.get(to))

    def callbacks(self) -> list[Any]:
        """New callbacks for a `Trainer` that trains a model of this family."""
        return [_imported(callback)() for callback in self.training_callbacks]


_FAMILIES: dict[str, Family] = {}


def _imported(function: Callable | str | None) -> Callable | None:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


def register_family(
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    *,
    classifier: type[PreTrainedModel] | None = None,
    video_classifier: type[PreTrainedModel] | None = None,
    backbone: type[PreTrainedModel] | None = None,
    image_processors: dict[str, type] | None = None,
    video_processor: type | None = None,
    converter: Callable | str | None = None,
    exporters: dict[str, Callable | str] | None = None,
    drawing: Callable | str | None = None,
    budget_drawing: Callable | str | None = None,
    training_callbacks: tuple[Callable | str, ...] = (),
    training_config: Callable | str | None = None,
    projection: type[PreTrainedModel] | None = None,
) -> Family:
    """Makes a family known to the Auto classes of transformers and to every tool of this library.

    How many tokens an image costs and what its budget is called is for the config to say: it inherits
    `polyscale.layers.token_budget.TokenBudgetMixin`.

    Args:
        config (`type`): the config class; its `model_type` names the family.
        model (`type`): the model without a head.
        classifier (`type`, *optional*): the image classifier.
        video_classifier (`type`, *optional*): the video classifier.
        backbone (`type`, *optional*): the backbone, where tokens can be laid out as maps.
        image_processors (`dict[str, type]`, *optional*): backend ("torchvision", "pil") -> image processor class.
        video_processor (`type`, *optional*): the video processor class.
        converter (`Callable` or `str`, *optional*): function (source, out, **options) that writes a checkpoint made
            from another library's into the empty folder `out`. Functions may be given as "module:function".
        exporters (`dict[str, Callable | str]`, *optional*): name of another library's model ("vit", "timm"), or
            model type of another family -> function (source, out, **options) that writes a checkpoint of this family
            as one of that kind into the empty folder `out`.
        drawing (`Callable` or `str`, *optional*): function (model, processor, image, budgets) -> matplotlib figure or
            PIL image: what the model looks at.
        budget_drawing (`Callable` or `str`, *optional*): function (axis, model, processor, image, budget) that draws
            one image as the model cuts it up at a budget.
        training_callbacks (`tuple`, *optional*): functions that make a `TrainerCallback` each, for every training.
        training_config (`Callable` or `str`, *optional*): function (image_size, num_channels, preset=None, base=None,
            **options) -> config to train images of (height, width) pixels with: of a size that fits them, of a preset,
            or the config `base` of a checkpoint, with some fields changed. When `None`, the config class is called.
        projection (`type`, *optional*): the model with a projection of its pooled tokens ("image_embeds"), as CLIP has
            it.

    Returns:
        `Family`: what was registered. A second registration of a `model_type` replaces the first.

    Raises:
        ValueError: for a config without a `model_type`.
    """
    if not getattr(config, "model_type", None):
        raise ValueError(f"`config` must have a `model_type`, the name of the family; {config.__name__} has none.")
    family = Family(
        config,
        model,
        classifier,
        video_classifier,
        backbone,
        dict(image_processors or {}),
        video_processor,
        converter,
        dict(exporters or {}),
        drawing,
        budget_drawing,
        tuple(training_callbacks),
        training_config,
        projection,
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    heads = (
        (AutoModelForImageClassification, classifier),
        (AutoModelForVideoClassification, video_classifier),
        (AutoBackbone, backbone),
    )
    for auto_class, head in heads:
        if head is not None:
            auto_class.register(config, head, exist_ok=True)
    if family.image_processors:
        AutoImageProcessor.register(config, image_processor_classes=family.image_processors, exist_ok=True)
    if video_processor is not None:
        AutoVideoProcessor.register(config, video_processor, exist_ok=True)
    add_budget_words(config)
    _FAMILIES[config.model_type] = family
    return family


def families() -> dict[str, Family]:
    """Every registered family, by its model type."""
    return dict(_FAMILIES)


def family_of(config: PreTrainedConfig | str) -> Family | None:
    """The family of a config or a model type; `None` for other people's models."""
    return _FAMILIES.get(config if isinstance(config, str) else config.model_type)


def projection_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class with a projection that a checkpoint with this config was saved as; `None` for all others."""
    projection = getattr(family_of(config), "projection_class", None)
    return projection if projection is not None and projection.__name__ in (config.architectures or []) else None


__all__ = ["Family", "families", "family_of", "projection_of", "register_family"]
