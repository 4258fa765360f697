"""Budget tuning: a model at its full token budget teaches itself at smaller ones, on images without labels."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import DatasetDict
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from ..layers.token_budget import TokenBudgetMixin, budget_argument_of, budget_kwargs
from .recipe import TrainingRecipe
from .starting_point import whole_checkpoint
from .trainer import BudgetTrainer, num_tokens_at


_EVALUATED_SHARES = 4


def features_of(outputs: ModelOutput, config: Any) -> torch.Tensor:
    """What a model makes of each image, (batch, width): its pooled output, or else what it would be pooled from."""
    pooled = outputs.get("pooler_output")
    if pooled is not None:
        return pooled
    tokens = outputs.hidden_states[-1] if outputs.get("last_hidden_state") is None else outputs.last_hidden_state
    prefix = getattr(config, "num_prefix_tokens", 0)
    if prefix and getattr(config, "pooling", "cls") != "mean":
        return tokens[:, 0]
    return tokens[:, prefix:].mean(dim=1)


class BudgetTuningTrainer(BudgetTrainer):
    """A trainer without labels: the model at a drawn budget is matched to itself, as it was, at the full budget.

    The loss is the Kullback-Leibler divergence of the logits, where there are any, and one minus the cosine of the
    features. Each optimiser step draws a share of the full budget, the same on every process; it depends on the seed
    and the number of the step alone.

    Args:
        shares: the lowest and the highest share of the full budget to draw.
        image_size: (height, width) in pixels of the images.
        temperature: of the softmax of both.
    """

    def __init__(
        self,
        *args,
        shares: tuple[float, float],
        image_size: tuple[int, int],
        temperature: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.shares = shares
        self.image_size = image_size
        self.temperature = temperature
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval().to(self.args.device)
        self.metrics = ("agreement", "loss") if has_classes(self.model) else ("cosine", "loss")

    def budget_at(self, step: int) -> Any:
        """The budget of an optimiser step."""
        share = np.random.default_rng([self.args.seed, step]).uniform(*self.shares)
        return self.model.config.budget_for_share(self.image_size, float(share))

    def budgets(self) -> list:
        """The budgets to evaluate at: from the lowest share to the highest."""
        config = self.model.config
        shares = np.linspace(*self.shares, _EVALUATED_SHARES)
        budgets = [config.budget_for_share(self.image_size, float(share)) for share in shares]
        by_tokens = {num_tokens_at(config, self.image_size, budget): budget for budget in budgets}
        return [by_tokens[tokens] for tokens in sorted(by_tokens)]

    def _outputs(self, model: nn.Module, pixel_values: torch.Tensor, budget: Any) -> ModelOutput:
        options = {"output_hidden_states": True} if has_classes(self.model) else {}
        return model(pixel_values=pixel_values, **options, **budget_kwargs(self.model.config, budget))

    @torch.no_grad()
    def target(self, pixel_values: torch.Tensor) -> ModelOutput:
        """What the model as it was says at its full budget."""
        return self._outputs(self.teacher, pixel_values, self.model.config.budget_for_share(self.image_size, 1.0))

    def losses(self, outputs: ModelOutput, target: ModelOutput) -> torch.Tensor:
        """The loss of each image: (batch,)."""
        config = self.model.config
        features, wanted = features_of(outputs, config).float(), features_of(target, config).float()
        losses = 1 - F.cosine_similarity(features, wanted, dim=-1)
        if outputs.get("logits") is not None:
            divergence = F.kl_div(
                F.log_softmax(outputs.logits.float() / self.temperature, dim=-1),
                F.log_softmax(target.logits.float() / self.temperature, dim=-1),
                reduction="none",
                log_target=True,
            )
            losses = losses + self.temperature**2 * divergence.sum(dim=-1)
        return losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = self._outputs(model, inputs["pixel_values"], self.budget_at(self.state.global_step))
        loss = self.losses(outputs, self.target(inputs["pixel_values"])).mean()
        return (loss, outputs) if return_outputs else loss

    def measure(self, model: nn.Module, inputs: dict[str, torch.Tensor], **budget) -> dict[str, torch.Tensor]:
        """Agreement with the full budget (same class, or cosine of the features) and the loss of each image."""
        target = self.target(inputs["pixel_values"])
        outputs = self._outputs(model, inputs["pixel_values"], next(iter(budget.values()), None))
        measured = {"loss": self.losses(outputs, target)}
        if "agreement" in self.metrics:
            return {**measured, "agreement": outputs.logits.argmax(dim=-1) == target.logits.argmax(dim=-1)}
        config = self.model.config
        features, wanted = features_of(outputs, config).float(), features_of(target, config).float()
        return {**measured, "cosine": F.cosine_similarity(features, wanted, dim=-1)}


def has_classes(model: PreTrainedModel) -> bool:
    """Whether a model is a classifier, rather than a tower."""
    return type(model) is not type(model.base_model)


def make_tuning_trainer(
    recipe: TrainingRecipe,
    splits: DatasetDict,
    arguments: Callable[[TrainingRecipe], TrainingArguments],
    datasets: Callable[[TrainingRecipe, DatasetDict, BaseImageProcessor], dict],
    collator: Callable,
) -> tuple[BudgetTuningTrainer, BaseImageProcessor, TrainingRecipe, list[str]]:
    """The trainer of a recipe with `tune_budgets`, the image processor to save, the completed recipe, and notes.

    Raises:
        ValueError: for a model whose budget cannot be chosen.
    """
    model, processor, recipe, notes = whole_checkpoint(recipe, len(splits["train"]))
    config = model.config
    if not isinstance(config, TokenBudgetMixin) or budget_argument_of(config) is None:
        raise ValueError(
            f"`tune_budgets`: a model of type {config.model_type!r} has no budget to choose. Give `family`, such as "
            "'quadtree_vit' or 'flexivit', to convert it first."
        )
    full, low = (config.budget_for_share(recipe.image_size, share) for share in (1.0, recipe.tune_budgets[0]))
    if full == low and recipe.tune_budgets[0] < 1:
        raise ValueError(f"`tune_budgets`: a model of type {config.model_type!r} has one budget alone, {full}.")
    trainer = BudgetTuningTrainer(
        model=model,
        args=arguments(recipe),
        **datasets(recipe, splits, processor),
        data_collator=collator,
        shares=recipe.tune_budgets,
        image_size=tuple(recipe.image_size),
        temperature=recipe.temperature,
    )
    return trainer, processor, recipe, notes


__all__ = ["BudgetTuningTrainer", "features_of", "has_classes", "make_tuning_trainer"]
