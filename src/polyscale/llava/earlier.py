"""Processors under the names that earlier versions saved them with."""

import os

from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from .layout import token_layout
from .packed import PackedTowerConfig
from .processing import BudgetLlavaProcessor


class PerPictureLlavaProcessor(BudgetLlavaProcessor):
    """What version 0.1 saved beside a LLaVA whose tower gives each image its own number of tokens.

    `from_pretrained` gives a `BudgetLlavaProcessor`; the config of the tower is read from the model's config.json in
    the same folder.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> BudgetLlavaProcessor:
        """
        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): of the model, not of the processor alone.
            kwargs: as in `LlavaProcessor.from_pretrained`.

        Raises:
            ValueError: where no LLaVA with such a tower lies beside the processor.
        """
        try:
            tower = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False).vision_config
        except (OSError, ValueError, AttributeError):
            tower = None
        if not isinstance(tower, PackedTowerConfig):
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds a processor that version 0.1 saved, which has to lie beside "
                "the config.json of its model: put it there."
            )
        old = LlavaProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        shared = {
            name: getattr(old, name) for name in ("image_processor", "tokenizer", "chat_template", "image_token")
        }
        return BudgetLlavaProcessor(
            **shared, **token_layout(tower).processor_settings, tower_config=tower.vision_config.to_dict()
        )


AutoProcessor.register(PerPictureLlavaProcessor, PerPictureLlavaProcessor, exist_ok=True)

__all__ = ["PerPictureLlavaProcessor"]
