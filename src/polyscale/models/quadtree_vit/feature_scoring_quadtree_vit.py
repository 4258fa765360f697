"""The patch scorer of the paper: features of a small frozen network (arXiv 2304.00287, section 3.2).

Faithful to TomerRonen34/mixed-resolution-vit, `mixed_res/patch_scorers`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...utils.validation import check_choice
from .configuration_quadtree_vit import SCORER_ERRORS
from .scoring_quadtree_vit import PatchScorer, average_to_grid


class ShuffleNetFeatures(nn.Module):
    """ShuffleNetV2 x0.5 without its head: stride 32, or its first part of stride 16 (torchvision's parameter names).

    Args:
        stride: 32 or 16.
        pretrained: whether torchvision downloads its ImageNet weights.

    Raises:
        ValueError: for another stride.
        OSError: if the weights cannot be downloaded.
    """

    def __init__(self, stride: int = 32, pretrained: bool = False):
        super().__init__()
        check_choice("stride", stride, (32, 16))
        self.stride = stride
        from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

        try:
            network = shufflenet_v2_x0_5(weights=ShuffleNet_V2_X0_5_Weights.DEFAULT if pretrained else None)
        except (OSError, RuntimeError) as error:
            raise OSError(
                "The weights of the 'feature' scorer (torchvision's ShuffleNetV2 x0.5) could not be downloaded: "
                f"{error}. Put {ShuffleNet_V2_X0_5_Weights.DEFAULT.url} into torch.hub's checkpoint folder, give a "
                f"network of your own, or load a checkpoint that holds the scorer."
            ) from error
        names = ["conv1", "maxpool", "stage2", "stage3"] + (["stage4", "conv5"] if stride == 32 else [])
        for name in names:
            self.add_module(name, getattr(network, name))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        for stage in self.children():
            pixel_values = stage(pixel_values)
        return pixel_values


class FeatureBasedPatchScorer(PatchScorer):
    """Loss of meaning: how far a small network's features of the blurred image are from those of the sharp one.

    The network is frozen, and stays in evaluation mode when the model around it trains.

    Args:
        min_patch_size (`int`, *optional*, defaults to 16): side in pixels of the smallest patches.
        max_patch_size (`int`, *optional*, defaults to 64): side in pixels of the largest.
        network (`nn.Module`, *optional*): a module that maps pixels to features (batch, width, rows, columns), or a
            transformers backbone (its last feature map is used); the paper's ShuffleNetV2 x0.5 when `None`.
        stride (`int`, *optional*, defaults to 32): stride in pixels of ShuffleNetV2: 32 or 16. Other networks show
            theirs in their output.
        error (`str`, *optional*, defaults to `"mse"`): `"mse"` or `"cosine"` (negative cosine similarity).
        reduction (`str`, *optional*, defaults to `"bilinear"`): how images are made smaller: `"bilinear"` or
            `"antialias"`.
        pretrained (`bool`, *optional*, defaults to `True`): whether ShuffleNetV2 gets its pretrained weights, which
            torchvision downloads.

    Raises:
        ValueError: for a stride too coarse for the smallest patches that have scores, those of twice `min_patch_size`.
        OSError: if the pretrained weights cannot be downloaded.
    """

    def __init__(
        self,
        min_patch_size: int = 16,
        max_patch_size: int = 64,
        network: nn.Module | None = None,
        stride: int = 32,
        error: str = "mse",
        pretrained: bool = True,
        reduction: str = "bilinear",
    ):
        super().__init__(min_patch_size, max_patch_size, reduction)
        check_choice("error", error, SCORER_ERRORS)
        self.error = error
        if network is None:
            self._check_stride(stride)
            network = ShuffleNetFeatures(stride, pretrained)
        self.network = network.requires_grad_(False).eval()

    def _check_stride(self, stride: float) -> None:
        finest = 2 * self.min_patch_size
        if stride > finest or finest % stride:
            raise ValueError(
                f"The stride of the 'feature' scorer's network, {stride:g} pixels, is too coarse for the smallest "
                f"patches: it must divide {finest}, twice `min_patch_size` = {self.min_patch_size}. Use a network of "
                f"a smaller stride (ShuffleNetV2 has 32 and 16), or larger patches."
            )

    def config_fields(self) -> dict[str, object]:
        fields = {"patch_scorer": "feature", "scorer_error": self.error, "reduction": self.reduction}
        if isinstance(self.network, ShuffleNetFeatures):
            return {**fields, "scorer_stride": self.network.stride, "scorer_backbone_config": None}
        if isinstance(self.network, PreTrainedModel) and hasattr(self.network, "out_features"):
            return {**fields, "scorer_backbone_config": self.network.config}
        raise ValueError(
            f"The network of this scorer, {type(self.network).__name__}, cannot be rebuilt from a config: use "
            f"ShuffleNetV2 or a transformers backbone for a scorer that is saved with a model, or give its scores as "
            f"`patch_scores`."
        )

    def train(self, mode: bool = True) -> "FeatureBasedPatchScorer":
        super().train(mode)
        # `from_pretrained` replaces parameters, which then want gradients again; it calls this afterwards.
        self.network.eval().requires_grad_(False)
        return self

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, width, rows, columns), float32."""
        features = self.network(pixel_values.to(next(self.network.parameters()).dtype))
        feature_maps = getattr(features, "feature_maps", None)
        return (features if feature_maps is None else feature_maps[-1]).float()

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        batch, _, height, width = pixel_values.shape
        sharp = self.features(pixel_values)
        self._check_stride(height / sharp.shape[-2])
        scores = []
        for size in self.scored_patch_sizes:
            blurred = self.features(self.blurred(pixel_values, size))
            if self.error == "mse":
                error = (blurred - sharp).square().mean(dim=1)
            else:
                error = -F.cosine_similarity(blurred, sharp, dim=1)
            scores.append(average_to_grid(error, (batch, height // size, width // size), "features"))
        return scores


__all__ = ["FeatureBasedPatchScorer", "ShuffleNetFeatures"]
