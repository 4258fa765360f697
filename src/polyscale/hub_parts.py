"""Code for models inside another model: a module that travels with the weights and registers them.

transformers looks for the code of the outer model alone. So the `auto_map` names a module that is written here: it
registers every model of this library inside the checkpoint, and holds the classes of the outer model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import IMAGE_PROCESSOR_MAPPING, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .utils.vision_configs import model_classes_of


MODULE = "polyscale_parts"


def inner_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configs inside a config, and those inside them."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from inner_configs(part)


@dataclass
class Parts:
    """What the module registers.

    Args:
        models: config class -> model class.
        image_processors: config class -> {backend: class}.
        others: classes that it only has to hold: processors, and an outer model of this library.
        outer: the outer model's class, if it is one of transformers.
    """

    models: dict[type, type] = field(default_factory=dict)
    image_processors: dict[type, dict[str, type]] = field(default_factory=dict)
    others: list[type] = field(default_factory=list)
    outer: type[PreTrainedModel] | None = None

    @classmethod
    def of(cls, configs: list[PreTrainedConfig], processor: ProcessorMixin | None = None) -> "Parts":
        """The parts with these configs, and a processor of this library if there is one."""
        parts = cls(others=[] if processor is None else [type(processor)])
        for config in configs:
            config_class = type(config)
            parts.models[config_class] = model_classes_of(config)[0]
            if config_class in IMAGE_PROCESSOR_MAPPING:
                parts.image_processors[config_class] = dict(IMAGE_PROCESSOR_MAPPING[config_class])
        return parts

    @property
    def classes(self) -> list[type]:
        """All classes of this library that the module imports."""
        processors = [one for backends in self.image_processors.values() for one in backends.values()]
        return list(dict.fromkeys([*self.models, *self.models.values(), *processors, *self.others]))

    @property
    def packages(self) -> frozenset[str]:
        """The packages whose modules travel."""
        modules = [__name__, *(one.__module__ for one in self.classes)]
        return frozenset(module.partition(".")[0] for module in modules)

    def auto_map(self, model_classes: dict[str, type]) -> dict[str, str]:
        """The `auto_map` of an outer model of transformers.

        Args:
            model_classes: Auto class name -> model class, for its config.
        """
        names = [name for name, model_class in model_classes.items() if model_class is self.outer]
        return {
            "AutoConfig": f"{MODULE}.{self.outer.config_class.__name__}",
            **dict.fromkeys(names, f"{MODULE}.{self.outer.__name__}"),
        }

    def source(self) -> str:
        """The source of the module."""
        types = ", ".join(repr(config.model_type) for config in self.models)
        lines = [
            '"""Registers the models inside of this checkpoint with transformers."""',
            "",
            "from transformers import AutoConfig, AutoImageProcessor, AutoModel",
            "from transformers import CONFIG_MAPPING",
            "from transformers.models.auto.processing_auto import processor_class_from_name",
        ]
        if self.outer is not None:
            config_class = self.outer.config_class
            lines += [
                f"from {config_class.__module__} import {config_class.__name__} as _Config",
                f"from {self.outer.__module__} import {self.outer.__name__} as _Model",
            ]
        lines += ["", "", "# Where the library itself is imported, its own classes are used."]
        lines += [f"if all(part in CONFIG_MAPPING for part in ({types},)):"]
        processors = [one for one in self.others if issubclass(one, ProcessorMixin)]
        lines += [f"    {one.__name__} = processor_class_from_name({one.__name__!r})" for one in processors] or [
            "    pass"
        ]
        lines += ["else:"]
        lines += [f"    from .{one.__module__.rpartition('.')[2]} import {one.__name__}" for one in self.classes]
        lines += [""]
        for config, model in self.models.items():
            lines += [
                f"    AutoConfig.register({config.model_type!r}, {config.__name__}, exist_ok=True)",
                f"    AutoModel.register({config.__name__}, {model.__name__}, exist_ok=True)",
            ]
        for config, backends in self.image_processors.items():
            named = ", ".join(f"{backend!r}: {one.__name__}" for backend, one in backends.items())
            classes = f"image_processor_classes={{{named}}}"
            lines.append(f"    AutoImageProcessor.register({config.__name__}, {classes}, exist_ok=True)")
        if self.outer is not None:
            name = self.outer.config_class.__name__
            lines += [
                "",
                "",
                f"class {name}(_Config):",
                '    """That of transformers."""',
                "",
                "",
                f"class {self.outer.__name__}(_Model):",
                '    """That of transformers."""',
                "",
                f"    config: {name}",
                f"    config_class = {name}",
            ]
        return "\n".join(lines) + "\n"


__all__ = ["MODULE", "Parts", "inner_configs"]
