"""A `transformers.Trainer` for image classification: soft labels (mixup, cutmix, smoothing), distillation, accuracy by
budget.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from ..layers.token_budget import (
    TokenBudgetMixin,
    budget_argument_of,
    budget_kwargs,
    default_budgets_of,
    plain_size,
)
from ..utils.validation import to_pair
from .callbacks import family_callbacks


def images_for_teacher(
    pixel_values: torch.Tensor, image_stats: tuple | None, image_size: int | tuple[int, int] | None
) -> torch.Tensor:
    """A student's images as its teacher wants them.

    Args:
        pixel_values: (batch, channels, height, width), normalised for the student.
        image_stats: ((mean, std) of the student, (mean, std) of the teacher), or None where they are the same.
        image_size: (height, width) in pixels, or int; None for that of the images.
    """
    if image_stats is not None:
        (mean, std), (teacher_mean, teacher_std) = (
            [pixel_values.new_tensor(values)[:, None, None] for values in stats] for stats in image_stats
        )
        pixel_values = (pixel_values * std + mean - teacher_mean) / teacher_std
    if image_size is not None and to_pair(image_size) != tuple(pixel_values.shape[-2:]):
        pixel_values = F.interpolate(pixel_values, to_pair(image_size), mode="bicubic", antialias=True)
    return pixel_values


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """torch's generators are afterwards where they were: what happens in between does not change a training run."""
    devices = [device.index or 0] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def num_tokens_at(config: Any, image_size: tuple[int, int], budget: Any) -> int | None:
    """Tokens of an image at a budget; `None` where that depends on the image, or the config does not say."""
    if not isinstance(config, TokenBudgetMixin):
        return None
    return config.num_tokens_for(image_size, **budget_kwargs(config, budget))


class WholeWeightsTrainer(Trainer):
    """`Trainer` that resumes with every weight of the checkpoint.

    transformers stores some models under other names than they have in memory (a ViT inside an S2, a LLaVA);
    `from_pretrained` translates them, `Trainer` does not and leaves such weights as they are.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        stored = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(stored.state_dict())
        return None


class BudgetTrainer(WholeWeightsTrainer):
    """What the trainers here share: the callbacks of the model's families, and an evaluation at each budget."""

    loss_is_scaled_for_ga = False
    metrics: tuple[str, ...] = ()  # what `measure` gives

    def __init__(self, *args, eval_collator: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        for callback in family_callbacks(self.model, self.callback_handler.callbacks):
            self.add_callback(callback)

    @property
    def budget_argument(self) -> str | None:
        """What the budgets are values of; None for a model without a budget to choose."""
        return budget_argument_of(self.model.config)

    def call_of(self, budget: Any) -> dict[str, Any]:
        """A budget as keyword arguments of `forward`."""
        return budget_kwargs(self.model.config, budget)

    def tokens_of(self, image_size: tuple[int, int], budget: Any) -> int | None:
        """Tokens of an image at a budget; None where that depends on the image, or the config does not say."""
        return num_tokens_at(self.model.config, image_size, budget)

    def budgets(self) -> list:
        """The budgets to evaluate at: those of the config; where that is one, also shares of the full one."""
        config = self.model.config
        budgets = default_budgets_of(config)
        if len(budgets) > 1 or budgets[0] is None or not isinstance(config, TokenBudgetMixin):
            return budgets
        size = tuple(to_pair(config.image_size, "image_size"))
        shares = [config.budget_for_share(size, share) for share in (0.25, 0.5, 1.0)]
        by_tokens = {num_tokens_at(config, size, budget): budget for budget in [*shares, *budgets]}
        return [by_tokens[tokens] for tokens in sorted(by_tokens)]

    def measure(self, model: nn.Module, inputs: dict[str, torch.Tensor], **budget) -> dict[str, torch.Tensor]:
        """Each of `metrics` for each image of a batch at one budget: (batch,)."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate_budgets(self, budgets: Sequence | None = None, model: nn.Module | None = None) -> list[dict]:
        """Scores the model on `eval_dataset` at each budget; every image is read once.

        Args:
            budgets: values of the budget argument; `budgets()` when None.
            model: the model to score, such as an average of weights; the trainer's own when None.

        Returns:
            For each budget its value, the tokens per image, the images, and the metrics of `measure`.
        """
        model = self.accelerator.unwrap_model(self.model) if model is None else model
        device = self.args.device
        budgets = self.budgets() if budgets is None else list(budgets)
        was_training = model.training
        model.to(device).eval()
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = [dict.fromkeys(self.metrics, zero) for _ in budgets]
        image_size = None
        with generators_kept(device):
            for batch in self._evaluation_batches():
                image_size = tuple(batch["pixel_values"].shape[-2:])
                for index, budget in enumerate(budgets):
                    with self.compute_loss_context_manager():
                        measured = self.measure(model, batch, **self.call_of(budget))
                    for name, values in measured.items():
                        sums[index][name] = sums[index][name] + values.double().sum()
        model.train(was_training)
        results = []
        for budget, totals in zip(budgets, sums, strict=True):
            totals = {name: float(self.accelerator.reduce(total)) for name, total in totals.items()}
            images = len(self.eval_dataset)
            tokens = self.tokens_of(image_size, budget)
            plain = plain_size(budget) if isinstance(budget, tuple) else budget
            metrics = {name: total / images for name, total in totals.items()}
            results.append({"budget": plain, "tokens": tokens, "images": images, **metrics})
        return results

    def _evaluation_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of the evaluation images, no image twice."""
        count, rank, size = len(self.eval_dataset), self.args.process_index, self.args.world_size
        loader = DataLoader(
            torch.utils.data.Subset(self.eval_dataset, range(rank, count, size)),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator or self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        for batch in loader:
            yield {name: value.to(self.args.device) for name, value in batch.items()}


class ImageClassificationTrainer(BudgetTrainer):
    """`Trainer` whose labels may be class indices or weights (batch, num_labels), with an optional teacher.

    With a teacher the loss is the Kullback-Leibler divergence of the student from the teacher at a temperature, times
    the squared temperature (arXiv 1503.02531), as FlexiViT is trained (arXiv 2212.08013: KL, temperature 1); the
    labels then only serve evaluation. Without one it is the cross entropy. The callbacks of the model's family are
    added.

    Args:
        teacher: an image-classification model, or None. It is frozen and in eval mode.
        teacher_classes: for each class of the student, its index in the teacher; the same when None.
        temperature: of the softmax of student and teacher.
        label_smoothing: of the cross entropy.
        image_stats: ((mean, std) of the student, (mean, std) of the teacher), when their normalisation differs.
        teacher_size: (height, width) in pixels that the teacher sees; that of its config when None.
    """

    metrics = ("top1", "loss")

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        teacher_classes: Sequence[int] | None = None,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        image_stats: tuple | None = None,
        teacher_size: tuple[int, int] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.image_stats = image_stats
        self.teacher = teacher
        self.teacher_classes = None if teacher_classes is None else list(teacher_classes)
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.teacher_size = teacher_size or getattr(getattr(teacher, "config", None), "image_size", None)

    def teacher_inputs(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images (batch, channels, height, width) normalised and resized as the teacher wants them."""
        return images_for_teacher(pixel_values, self.image_stats, self.teacher_size)

    @torch.no_grad()
    def teacher_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (batch, num_labels) for the student's images and classes, in float32."""
        logits = self.teacher(self.teacher_inputs(pixel_values)).logits.float()
        return logits if self.teacher_classes is None else logits[:, self.teacher_classes]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(pixel_values=inputs["pixel_values"])
        logits = outputs.logits.float()
        if self.teacher is not None and model.training:
            loss = self.temperature**2 * F.kl_div(
                F.log_softmax(logits / self.temperature, dim=-1),
                F.log_softmax(self.teacher_logits(inputs["pixel_values"]) / self.temperature, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
        else:
            smoothing = self.label_smoothing if model.training else 0.0
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return (loss, {"logits": logits}) if return_outputs else loss

    def measure(self, model: nn.Module, inputs: dict[str, torch.Tensor], **budget) -> dict[str, torch.Tensor]:
        """Top-1 accuracy and cross entropy of each image."""
        logits = model(pixel_values=inputs["pixel_values"], **budget).logits.float()
        return {
            "top1": logits.argmax(dim=-1) == inputs["labels"],
            "loss": F.cross_entropy(logits, inputs["labels"], reduction="none"),
        }


__all__ = [
    "BudgetTrainer",
    "ImageClassificationTrainer",
    "WholeWeightsTrainer",
    "generators_kept",
    "images_for_teacher",
    "num_tokens_at",
]
