"""Trainer callback of FlexiViT."""

from collections.abc import Iterator

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .modeling_flexivit import FlexiViTEmbeddings


def _flexivit_embeddings(model: nn.Module) -> Iterator[FlexiViTEmbeddings]:
    return (module for module in model.modules() if isinstance(module, FlexiViTEmbeddings))


def _normalised(probs: list | tuple | None) -> np.ndarray | None:
    """Probabilities in float64 that sum to 1 exactly, as NumPy wants them."""
    if probs is None:
        return None
    probs = np.asarray(probs, dtype=np.float64)
    return probs / probs.sum()


class PatchSizeCallback(TrainerCallback):
    """Draws one FlexiViT patch size per optimiser step: the same on every process and for every micro-batch of it.

    Without it each forward draws its own, and with several processes the one with the smallest patches sets the pace.
    The draw depends on the seed and the number of the step alone, so a resumed run goes on with the sizes that the
    unbroken one would have had. Works for any model that holds a FlexiViT (a LLaVA tower, a PEFT or compiled model).

    Args:
        seed (`int`, *optional*): seed of the draws; `TrainingArguments.seed` when `None`.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def patch_size_at(self, config, step: int, seed: int):
        """The entry of `config.train_patch_sizes` for optimiser step `step`."""
        index = np.random.default_rng([seed, step]).choice(
            len(config.train_patch_sizes), p=_normalised(config.train_patch_size_probs)
        )
        return config.train_patch_sizes[int(index)]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        seed = args.seed if self.seed is None else self.seed
        for embeddings in _flexivit_embeddings(model):
            if embeddings.config.train_patch_sizes is not None:
                embeddings.step_patch_size = self.patch_size_at(embeddings.config, state.global_step, seed)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        for embeddings in _flexivit_embeddings(model):
            embeddings.step_patch_size = None


__all__ = ["PatchSizeCallback"]
