"""Which kind of model takes which adapter."""

from torch import nn

from .adapters import LlavaAdapter, LlavaNextAdapter, LlavaOnevisionAdapter, VipLlavaAdapter
from .gemma_adapters import Gemma3Adapter, PaliGemmaAdapter


ADAPTERS = (
    LlavaAdapter(),
    LlavaNextAdapter(),
    LlavaOnevisionAdapter(),
    VipLlavaAdapter(),
    PaliGemmaAdapter(),
    Gemma3Adapter(),
)


def adapter_of(model: object, name: str = "llava_model") -> LlavaAdapter:
    """The adapter for a model, which errors call `name`.

    Raises:
        ValueError: for a model of another kind; it lists those that there are.
    """
    for adapter in ADAPTERS:
        if type(model) in adapter.model_classes:
            return adapter
    kinds = ", ".join(adapter.model_classes[0].__name__ for adapter in ADAPTERS)
    known = {kind for adapter in ADAPTERS for kind in adapter.model_classes}
    inside = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((type(part).__name__ for part in inside if type(part) in known), None)
    hint = "" if inner is None else f", with a {inner} inside: give that one"
    raise ValueError(
        f"`{name}` must be one of {kinds}, or its model without a head; got {type(model).__name__}{hint}."
    )


__all__ = ["ADAPTERS", "adapter_of"]
