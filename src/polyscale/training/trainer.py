"""A `transformers.Trainer` for image classification: soft labels (mixup, cutmix, smoothing) and distillation."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from ..utils.validation import to_pair
from .callbacks import LossScaleCallback


def pictures_for_teacher(
    pixel_values: torch.Tensor, image_stats: tuple | None, image_size: int | tuple[int, int] | None
) -> torch.Tensor:
    """A student's pictures as its teacher wants them.

    Args:
        pixel_values: (batch, channels, height, width), normalised for the student.
        image_stats: ((mean, std) of the student, (mean, std) of the teacher), or None where they are the same.
        image_size: (height, width) in pixels, or int; None for that of the pictures.
    """
    if image_stats is not None:
        (mean, std), (teacher_mean, teacher_std) = (
            [pixel_values.new_tensor(values)[:, None, None] for values in stats] for stats in image_stats
        )
        pixel_values = (pixel_values * std + mean - teacher_mean) / teacher_std
    if image_size is not None and to_pair(image_size) != tuple(pixel_values.shape[-2:]):
        pixel_values = F.interpolate(pixel_values, to_pair(image_size), mode="bicubic", antialias=True)
    return pixel_values


class ImageClassificationTrainer(Trainer):
    """`Trainer` whose labels may be class indices or weights (batch, num_labels), with an optional teacher.

    With a teacher the loss is the Kullback-Leibler divergence of the student from the teacher at a temperature, times
    the squared temperature (arXiv 1503.02531), as FlexiViT is trained (arXiv 2212.08013: KL, temperature 1); the
    labels then only serve evaluation. Without one it is the cross entropy.

    Args:
        teacher: an image-classification model with the same classes, or None. It is frozen and in eval mode.
        temperature: of the softmax of student and teacher.
        label_smoothing: of the cross entropy.
        image_stats: ((mean, std) of the student, (mean, std) of the teacher), when their normalisation differs.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        image_stats: tuple | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.add_callback(LossScaleCallback(self.accelerator))
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.image_stats = image_stats
        self.teacher = teacher
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def teacher_inputs(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The pictures (batch, channels, height, width) normalised and resized as the teacher wants them."""
        return pictures_for_teacher(pixel_values, self.image_stats, getattr(self.teacher.config, "image_size", None))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(pixel_values=inputs["pixel_values"])
        logits = outputs.logits.float()
        if self.teacher is not None and model.training:
            with torch.no_grad():
                targets = self.teacher(self.teacher_inputs(inputs["pixel_values"])).logits.float()
            loss = self.temperature**2 * F.kl_div(
                F.log_softmax(logits / self.temperature, dim=-1),
                F.log_softmax(targets / self.temperature, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
        else:
            smoothing = self.label_smoothing if model.training else 0.0
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return (loss, {"logits": logits}) if return_outputs else loss


__all__ = ["ImageClassificationTrainer", "pictures_for_teacher"]
