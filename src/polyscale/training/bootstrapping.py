"""Bootstrapping a SparseFormer from a ViT (arXiv 2312.01987): new sampling layers in front of the ViT's own blocks.

The student learns to give the teacher's final token, on images without labels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..layers.config_checks import field_names
from ..loading import load_checkpoint
from ..models.flexivit.convert_flexivit import load_flexivit_source
from ..models.sparseformer.configuration_sparseformer import SparseFormerConfig, bootstrapped_operations
from ..models.sparseformer.convert_sparseformer_vit import ViTLoadingReport, load_vit_weights
from ..models.sparseformer.modeling_sparseformer import SparseFormerModel
from ..utils.validation import to_pair
from .recipe import TrainingRecipe
from .trainer import BudgetTrainer, images_for_teacher


# What the class token is called in the ViTs of transformers.
_CLASS_TOKENS = ("cls_token", "class_embedding")
# Images that the variance of the teacher's tokens is measured on.
_VARIANCE_IMAGES = 256


def load_teacher(name_or_path: str, recipe: TrainingRecipe | None = None) -> PreTrainedModel:
    """A ViT: a bundled checkpoint, a folder or a hub name; of a CLIP with two towers, the vision tower.

    Raises:
        ValueError: if it cannot be read, or lacks tensors.
    """
    model = load_checkpoint(
        name_or_path,
        AutoModel,
        trust_remote_code=recipe is not None and recipe.trust_remote_code,
        argument="bootstrap_from",
        unused=("pooler.",),  # a ViT that was saved with its classifier has none, and `final_token` reads none
        dtype=torch.float32,
    )
    return getattr(model, "vision_model", model)


def teacher_pooling(teacher: PreTrainedModel) -> str:
    """ "cls" where the final token of a ViT is its CLS token; "mean" where it pools all tokens, or has no CLS."""
    has_cls = any(name.endswith(_CLASS_TOKENS) for name, _ in teacher.named_parameters())
    return "cls" if has_cls and getattr(teacher.config, "pooling", "cls") != "mean" else "mean"


def final_token(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """The final token of a ViT or a SparseFormer (batch, width), after its last norm.

    It is the pooled output, unless that has a linear layer of its own (ViT, DeiT) or another width: then it is the CLS
    token, or the mean of the tokens where there is none.
    """
    outputs: BaseModelOutputWithPooling = model(pixel_values)
    tokens, pooled = outputs.last_hidden_state, outputs.get("pooler_output")
    pooler = getattr(model, "pooler", None)
    is_transformed = pooler is not None and any(isinstance(module, nn.Linear) for module in pooler.modules())
    if pooled is not None and not is_transformed and pooled.shape[-1] == tokens.shape[-1]:
        return pooled
    return tokens[:, 0] if teacher_pooling(model) == "cls" else tokens.mean(dim=1)


def make_student(
    teacher: PreTrainedModel,
    num_latent_tokens: int = 48,
    num_blocks: int | None = None,
    frozen_share: float = 1 / 3,
    **options,
) -> tuple[SparseFormerModel, ViTLoadingReport]:
    """A bootstrapped SparseFormer whose later layers are the last blocks of a ViT.

    The student pools as the teacher does: by a CLS token, or by the mean of its tokens. Its final norm is the
    teacher's, and is trained only where that norm stands elsewhere in the teacher (before a mean).

    Args:
        teacher: a ViT, DeiT, DINOv2, CLIP vision tower or FlexiViT, with or without a CLS token.
        num_latent_tokens: tokens with a RoI; CLS, if any, comes on top.
        num_blocks: blocks to take over, counted from the end; two thirds of the teacher's when None.
        frozen_share: share of the ViT's depth, counted from the end, that is not trained.
        options: fields of `SparseFormerConfig` that differ (such as `feature_width`, or `restrict_grad_norm`).

    Returns:
        The student, and what it has from the teacher.

    Raises:
        ValueError: if the teacher has no blocks of a known layout, or fewer than asked for, or for an unknown option.
    """
    unknown = sorted(set(options) - set(field_names(SparseFormerConfig)))
    if unknown:
        raise ValueError(f"`options` must be fields of `SparseFormerConfig`, got {', '.join(map(repr, unknown))}.")
    if not 0 <= frozen_share <= 1:
        raise ValueError(f"`frozen_share` must be between 0 and 1, got {frozen_share}.")
    source = load_flexivit_source(teacher)
    vit = source.config
    depth, width = vit.num_hidden_layers, vit.hidden_size
    num_blocks = max(round(depth * 2 / 3), 1) if num_blocks is None else num_blocks
    if not 1 <= num_blocks <= depth:
        raise ValueError(f"`num_blocks` must be between 1 and the teacher's {depth}, got {num_blocks}.")
    pooling = teacher_pooling(teacher)
    fields = {
        **SparseFormerConfig.preset("sparseformer_btsp_augreg_base").to_diff_dict(),
        "num_latent_tokens": num_latent_tokens,
        "widths": [width // 2] + [width] * (num_blocks + 1),
        "repeats": [4] + [1] * (num_blocks + 1),
        "operations": bootstrapped_operations(num_blocks + 2),
        "attention_head_width": width // vit.num_attention_heads,
        "hidden_act": vit.hidden_act,
        "layer_norm_eps": vit.layer_norm_eps,
        "mlp_ratio": vit.intermediate_size / width,
        "image_size": vit.image_size,
        "pooling": pooling,
        "cls_token_layer": 2 if pooling == "cls" else None,
        **options,
    }
    fields = {name: value for name, value in fields.items() if name in field_names(SparseFormerConfig)}
    student = SparseFormerModel(SparseFormerConfig(**fields))
    report = load_vit_weights(
        student, source, layers=range(2, num_blocks + 2), blocks=range(depth - num_blocks, depth)
    )
    num_frozen = min(round(depth * frozen_share), num_blocks)
    for layer in student.layers[len(student.layers) - num_frozen :]:
        layer.requires_grad_(False)
    has_norm = "layernorm.weight" in report.loaded and pooling == student.config.pooling == "cls"
    student.layernorm.requires_grad_(not (num_frozen and has_norm))
    return student, report


class BootstrapTrainer(BudgetTrainer):
    """A trainer without labels: the student's final token is matched to the teacher's.

    The loss is the mean squared difference over the variance of the teacher's tokens: 1 for a student that always
    gives their mean, 0 for one that equals the teacher.

    Args:
        teacher: as in `make_student`; it is frozen and in eval mode.
        image_stats: ((mean, std) of the student, (mean, std) of the teacher), when their normalisation differs.
        teacher_size: (height, width) in pixels that the teacher sees; None for the student's.
    """

    metrics = ("loss",)

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        image_stats: tuple | None = None,
        teacher_size: tuple[int, int] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.image_stats = image_stats
        self.teacher_size = None if teacher_size is None else to_pair(teacher_size, "teacher_size")
        self.variance = self._measure_variance()

    @torch.no_grad()
    def target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The teacher's final token (batch, width) for the student's images, in float32."""
        images = images_for_teacher(pixel_values, self.image_stats, self.teacher_size)
        return final_token(self.teacher, images).float()

    def _measure_variance(self) -> torch.Tensor:
        """Variance of the teacher's tokens over the first training images, mean of their channels.

        Measured before training: that of a batch changes from one to the next, and is 0 where a batch has one image.
        """
        step = self.args.per_device_train_batch_size
        indices = range(min(len(self.train_dataset), _VARIANCE_IMAGES))
        batches = (
            self.data_collator([self.train_dataset[index] for index in indices[start : start + step]])
            for start in indices[::step]
        )
        tokens = torch.cat([self.target(batch["pixel_values"].to(self.args.device)) for batch in batches])
        return tokens.var(dim=0, correction=0).mean().clamp(min=1e-6)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"], pooled_only=True)
        target = self.target(inputs["pixel_values"])
        loss = F.mse_loss(outputs.pooler_output.float(), target) / self.variance
        return (loss, outputs) if return_outputs else loss

    def measure(self, model: nn.Module, inputs: dict[str, torch.Tensor], **budget) -> dict[str, torch.Tensor]:
        """The loss of each image."""
        token = model(pixel_values=inputs["pixel_values"], pooled_only=True).pooler_output.float()
        return {"loss": (token - self.target(inputs["pixel_values"])).square().mean(dim=-1) / self.variance}


__all__ = ["BootstrapTrainer", "final_token", "load_teacher", "make_student", "teacher_pooling"]
