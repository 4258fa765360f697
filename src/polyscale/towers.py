"""Another vision tower for a model in memory, whatever kind of model that is."""

from typing import Any

from transformers import PreTrainedModel, ProcessorMixin


def swap_vision_tower(
    model: PreTrainedModel, tower: PreTrainedModel, processor: ProcessorMixin | None = None, **options: Any
) -> ProcessorMixin | PreTrainedModel | None:
    """Puts another vision tower into a model.

    A LLaVA-style model, a PaliGemma or a Gemma 3 is changed in place, and its matching processor comes back:
    arguments, errors and an example are those of `polyscale.llava.swap.swap_vision_tower`. A CLIP-like model
    (`CLIPModel`, `SiglipModel`, `VisionTextDualEncoderModel`) stays as it is, and a new model comes back that shares
    the weights: see `polyscale.dual_encoders.swap_dual_encoder_tower`.

    Args:
        model (`PreTrainedModel`): the model.
        tower (`PreTrainedModel`): a vision model without a head.
        processor (`ProcessorMixin`, *optional*): of a model that is changed in place.
        options: for a model that is changed in place.

    Returns:
        The processor that matches (`None` without `processor`), or the new CLIP-like model.

    Raises:
        ValueError: for another kind of model, or a tower that does not fit; nothing is changed then.
    """
    from .dual_encoders.swap_dual_encoder import is_dual_encoder, swap_dual_encoder_tower
    from .llava.swap import swap_vision_tower as swap_llava_tower

    if not is_dual_encoder(model):
        return swap_llava_tower(model, tower, processor, **options)
    given = [name for name, value in {"processor": processor, **options}.items() if value is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` has no use for a {type(model).__name__}: its tokenizer and image processor stay as they "
            "are, or are those of the tower."
        )
    return swap_dual_encoder_tower(model, tower)


__all__ = ["swap_vision_tower"]
