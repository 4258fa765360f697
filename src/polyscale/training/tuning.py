"""Budget tuning: a model at its full token budget teaches itself at smaller ones, on images without labels."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import DatasetDict
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from ..layers.token_budget import TokenBudgetMixin, budget_argument_of
from .recipe import TrainingRecipe
from .starting_point import whole_checkpoint
from .trainer import BudgetTrainer, generators_kept, num_tokens_at


_EVALUATED_SHARES = 4
_KEPT_IMAGES = 32


def features_of(outputs: ModelOutput, config: Any) -> torch.Tensor:
    """What a model makes of each image, (batch, width): its embedding, its pooled output, or else what it would be
    pooled from.
    """
    for name in ("image_embeds", "pooler_output"):
        if outputs.get(name) is not None:
            return outputs[name]
    tokens = outputs.hidden_states[-1] if outputs.get("last_hidden_state") is None else outputs.last_hidden_state
    prefix = getattr(config, "num_prefix_tokens", 0)
    if prefix and getattr(config, "pooling", "cls") != "mean":
        return tokens[:, 0]
    return tokens[:, prefix:].mean(dim=1)


class BudgetTuningTrainer(BudgetTrainer):
    """A trainer without labels: the model at a drawn budget is matched to itself, as it was, at the full budget.

    The loss is the Kullback-Leibler divergence of the logits, where there are any, and one minus the cosine of the
    features, unless only a weighted mean of them is read, whose weights a classifier does not give. Each optimiser
    step draws a share of the full budget, the same on every process; it depends on the seed and the number of the
    step alone.

    Args:
        shares: the lowest and the highest share of the full budget to draw.
        image_size: (height, width) in pixels of the images.
        temperature: of the softmax of both.
        merging: whether the budgets are numbers of tokens that are left of the full budget by token merging, rather
            than those of the family.
    """

    def __init__(
        self,
        *args,
        shares: tuple[float, float],
        image_size: tuple[int, int],
        temperature: float = 1.0,
        merging: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.merging = merging
        config = self.model.config
        has_weights = merging or getattr(config, "area_pooling", False)
        weighs = has_weights and getattr(config, "pooling", None) == "mean"
        self.reads_features = not (weighs and has_classes(self.model))
        self.shares = shares
        self.image_size = image_size
        self.temperature = temperature
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval().to(self.args.device)
        self.metrics = ("agreement", "loss") if has_classes(self.model) else ("cosine", "loss")

    @property
    def budget_argument(self) -> str | None:
        return "merge_tokens_to" if self.merging else super().budget_argument

    def call_of(self, budget: Any) -> dict[str, Any]:
        if not self.merging:
            return super().call_of(budget)
        return {**super().call_of(self.full_budget()), "merge_tokens_to": budget}

    def tokens_of(self, image_size: tuple[int, int], budget: Any) -> int | None:
        return budget if self.merging else super().tokens_of(image_size, budget)

    def full_budget(self) -> Any:
        """The family's budget at which the model teaches."""
        return self.model.config.budget_for_share(self.image_size, 1.0)

    def budget_of(self, share: float) -> Any:
        """The budget nearest to a share of the full one."""
        if not self.merging:
            return self.model.config.budget_for_share(self.image_size, share)
        return max(round(share * num_tokens_at(self.model.config, self.image_size, self.full_budget())), 1)

    @torch.no_grad()
    def check_budget(self, budget: Any) -> None:
        """Runs the model at a budget, so that one that its layers cannot reach is refused before training.

        Raises:
            ValueError: for such a budget.
        """
        with generators_kept(self.args.device):
            pixels = torch.zeros(1, self.model.config.num_channels, *self.image_size, device=self.args.device)
            self._outputs(self.teacher, pixels, self.call_of(budget))

    def budget_at(self, step: int) -> Any:
        """The budget of an optimiser step."""
        return self.budget_of(float(np.random.default_rng([self.args.seed, step]).uniform(*self.shares)))

    def budgets(self) -> list:
        """The budgets to evaluate at: from the lowest share to the highest."""
        budgets = [self.budget_of(float(share)) for share in np.linspace(*self.shares, _EVALUATED_SHARES)]
        by_tokens = {self.tokens_of(self.image_size, budget): budget for budget in budgets}
        return [by_tokens[tokens] for tokens in sorted(by_tokens)]

    def _outputs(self, model: nn.Module, pixel_values: torch.Tensor, call: dict[str, Any]) -> ModelOutput:
        options = {"output_hidden_states": True} if has_classes(self.model) else {}
        return model(pixel_values=pixel_values, **options, **call)

    @torch.no_grad()
    def target(self, pixel_values: torch.Tensor) -> ModelOutput:
        """What the model as it was says at its full budget."""
        return self._outputs(self.teacher, pixel_values, super().call_of(self.full_budget()))

    def losses(self, outputs: ModelOutput, target: ModelOutput) -> torch.Tensor:
        """The loss of each image: (batch,)."""
        losses = 1 - self._cosine(outputs, target) if self.reads_features else 0
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
        outputs = self._outputs(model, inputs["pixel_values"], self.call_of(self.budget_at(self.state.global_step)))
        loss = self.losses(outputs, self.target(inputs["pixel_values"])).mean()
        return (loss, outputs) if return_outputs else loss

    def measure(self, model: nn.Module, inputs: dict[str, torch.Tensor], **budget) -> dict[str, torch.Tensor]:
        """Agreement with the full budget (same class, or cosine of the features) and the loss of each image."""
        target = self.target(inputs["pixel_values"])
        outputs = self._outputs(model, inputs["pixel_values"], budget)
        measured = {"loss": self.losses(outputs, target)}
        if "agreement" in self.metrics:
            return {**measured, "agreement": outputs.logits.argmax(dim=-1) == target.logits.argmax(dim=-1)}
        return {**measured, "cosine": self._cosine(outputs, target)}

    @cached_property
    def kept_images(self) -> torch.Tensor:
        """A few images that runs of these weights and others are compared on, (images, channels, height, width): from
        all over the evaluation images, or the training images where there are none.
        """
        images = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        places = np.linspace(0, len(images) - 1, min(len(images), _KEPT_IMAGES)).round().astype(int)
        return self.data_collator([images[int(place)] for place in places])["pixel_values"]

    @torch.no_grad()
    def kept_losses(self, model: nn.Module) -> torch.Tensor:
        """The loss of a model on each of `kept_images`, the mean over the budgets to evaluate at: (images,)."""
        was_training, losses = model.training, []
        model.eval()
        with generators_kept(self.args.device), self.compute_loss_context_manager():
            for images in self.kept_images.split(self.args.per_device_eval_batch_size):
                images = images.to(self.args.device)
                target = self.target(images)
                outputs = [self._outputs(model, images, self.call_of(budget)) for budget in self.budgets()]
                losses.append(torch.stack([self.losses(output, target) for output in outputs]).mean(dim=0))
        model.train(was_training)
        return torch.cat(losses).double().cpu()

    def _cosine(self, outputs: ModelOutput, target: ModelOutput) -> torch.Tensor:
        config = self.model.config
        return F.cosine_similarity(features_of(outputs, config).float(), features_of(target, config).float(), dim=-1)


def has_classes(model: PreTrainedModel) -> bool:
    """Whether a model is a classifier, rather than a tower."""
    classifier = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    return classifier is not None and isinstance(model, classifier)


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
    merging = recipe.tune_by == "merging"
    if merging and not hasattr(config, "merge_tokens_to"):
        raise ValueError(f"`tune_by`: a model of type {config.model_type!r} does not merge tokens; give 'budget'.")
    trainer = BudgetTuningTrainer(
        model=model,
        args=arguments(recipe),
        **datasets(recipe, splits, processor),
        data_collator=collator,
        shares=recipe.tune_budgets,
        image_size=tuple(recipe.image_size),
        temperature=recipe.temperature,
        merging=merging,
    )
    lowest = trainer.budget_of(recipe.tune_budgets[0])
    if lowest == trainer.budget_of(1.0) and recipe.tune_budgets[0] < 1:
        raise ValueError(f"`tune_budgets`: a model of type {config.model_type!r} has one budget alone, {lowest}.")
    trainer.check_budget(lowest)
    return trainer, processor, recipe, notes


__all__ = ["BudgetTuningTrainer", "features_of", "has_classes", "make_tuning_trainer"]
