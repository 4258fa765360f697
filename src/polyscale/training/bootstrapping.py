"""Bootstrapping a SparseFormer from a ViT (arXiv 2312.01987): new sampling layers in front of the ViT's own blocks.

The student learns to give the teacher's final CLS token, on pictures without labels.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Trainer

from ..models.sparseformer.configuration_sparseformer import SparseFormerConfig, bootstrapped_operations
from ..models.sparseformer.convert_sparseformer_vit import ViTLoadingReport, load_vit_weights, read_vit_blocks
from ..models.sparseformer.modeling_sparseformer import SparseFormerModel
from .callbacks import LossScaleCallback


def make_student(
    teacher: PreTrainedModel,
    num_latent_tokens: int = 48,
    num_blocks: int | None = None,
    frozen_share: float = 1 / 3,
    **options,
) -> tuple[SparseFormerModel, ViTLoadingReport]:
    """A bootstrapped SparseFormer whose later layers are the last blocks of a ViT.

    Args:
        teacher: a ViT, DINOv2, CLIP vision tower or FlexiViT, with a CLS token.
        num_latent_tokens: tokens with a RoI; CLS comes on top.
        num_blocks: blocks to take over, counted from the end; two thirds of the teacher's when None.
        frozen_share: share of the ViT's depth, counted from the end, that is not trained.
        options: fields of `SparseFormerConfig` that differ (such as `feature_width`, or `restrict_grad_norm`).

    Returns:
        The student, and what it has from the teacher.

    Raises:
        ValueError: if the teacher has no blocks of a known layout, or fewer than asked for.
    """
    state_dict = teacher.state_dict()
    found, _ = read_vit_blocks(state_dict)
    depth, width = len(found), teacher.config.hidden_size
    num_blocks = max(round(depth * 2 / 3), 1) if num_blocks is None else num_blocks
    if not 1 <= num_blocks <= depth:
        raise ValueError(f"`num_blocks` must be between 1 and the teacher's {depth}, got {num_blocks}.")
    fields = {
        **SparseFormerConfig.preset("sparseformer_btsp_augreg_base").to_diff_dict(),
        "num_latent_tokens": num_latent_tokens,
        "widths": [width // 2] + [width] * (num_blocks + 1),
        "repeats": [4] + [1] * (num_blocks + 1),
        "operations": bootstrapped_operations(num_blocks + 2),
        "attention_head_width": width // teacher.config.num_attention_heads,
        "hidden_act": teacher.config.hidden_act,
        "layer_norm_eps": teacher.config.layer_norm_eps,
        "mlp_ratio": found[0]["fc1.weight"].shape[0] / width,
        "image_size": teacher.config.image_size,
        **options,
    }
    fields = {name: value for name, value in fields.items() if name in SparseFormerConfig.__dataclass_fields__}
    student = SparseFormerModel(SparseFormerConfig(**fields))
    report = load_vit_weights(
        student, state_dict, layers=range(2, num_blocks + 2), blocks=range(depth - num_blocks, depth)
    )
    num_frozen = min(round(depth * frozen_share), num_blocks)
    for layer in student.layers[len(student.layers) - num_frozen :]:
        layer.requires_grad_(False)
    student.layernorm.requires_grad_(num_frozen == 0)
    return student, report


class BootstrapTrainer(Trainer):
    """`Trainer` without labels: the student's final CLS token is matched to the teacher's.

    The loss is the mean squared difference over the variance of the teacher's tokens: 1 for a student that always
    gives their mean.

    Args:
        teacher: as in `make_student`; it is frozen and in eval mode.
    """

    def __init__(self, *args, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.add_callback(LossScaleCallback(self.accelerator))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            target = self.teacher(inputs["pixel_values"]).last_hidden_state[:, 0].float()
        variance = target.var(dim=0, correction=0).mean().clamp(min=1e-6)
        loss = F.mse_loss(outputs.pooler_output.float(), target) / variance
        return (loss, outputs) if return_outputs else loss


__all__ = ["BootstrapTrainer", "make_student"]
