"""The Grad-CAM oracle of arXiv 2304.00287, section 5: patch scores that know the label.

The paper analysed it, and published maps but no code. Grad-CAM is arXiv 1610.02391.
"""

import torch
from torch import nn

from .configuration_quadtree_vit import QuadtreeViTConfig, count_levels
from .pyramid_quadtree_vit import reverse_quadtree
from .scoring_quadtree_vit import average_to_grid, resize_bilinear
from .selection_quadtree_vit import check_multiple


def _features_and_logits(
    model: nn.Module, pixel_values: torch.Tensor, target_layer: nn.Module | None, budget: dict
) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Activations with a gradient path to the logits, the logits, and the model's output."""
    captured = []
    if target_layer is not None:
        handle = target_layer.register_forward_hook(lambda module, inputs, output: captured.append(output))
        try:
            output = model(pixel_values, **budget)
        finally:
            handle.remove()
        if not captured:
            raise ValueError("`target_layer` was not called in the forward pass of `model`.")
        features = captured[-1][0] if isinstance(captured[-1], tuple) else captured[-1]
    else:
        output = model(pixel_values, output_hidden_states=True, **budget)
        hidden_states = getattr(output, "hidden_states", None)
        if not hidden_states:
            raise ValueError("`model` gives no hidden states: name the `target_layer` whose output Grad-CAM looks at.")
        # The last layer's output reaches the logits through CLS alone in many ViTs: its input reaches them through
        # every patch.
        features = hidden_states[-1] if hidden_states[-1].ndim == 4 else hidden_states[-2]
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return features, logits, output


def _heat_map(features: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM: channels (dimension 1) weighted by their mean gradient, negative values cut: (batch, ...)"""
    weights = gradients.flatten(2).mean(dim=2)
    return torch.einsum("bc,bc...->b...", weights, features).relu()


def gradcam_oracle(
    model: nn.Module,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    *,
    target_layer: nn.Module | None = None,
    min_patch_size: int | None = None,
    max_patch_size: int | None = None,
) -> list[torch.Tensor]:
    """Patch scores from the label: where a classifier looks for it, by Grad-CAM (arXiv 1610.02391).

    The map is scaled to a maximum of 1 in each image, resized bilinearly to the grid of the smallest patches, and
    averaged over each patch that can be split. A Quadtree ViT looks at the image with every patch split.

    Args:
        model (`nn.Module`): an image classifier: of this library or transformers (hidden states are used), or any
            module that maps pixels to logits, with `target_layer`. Its mode (train or eval) and parameters' gradients
            are left as they are.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images, normalised as `model`
            expects.
        labels (`torch.Tensor` of shape `(batch,)`): class indices.
        target_layer (`nn.Module`, *optional*): the module whose output is looked at, (batch, channels, rows, columns)
            or (batch, tokens, width) with the tokens of a square grid last; found by itself where the model returns
            hidden states.
        min_patch_size (`int`, *optional*): side in pixels of the smallest patches; that of `model.config`, or 16.
        max_patch_size (`int`, *optional*): side in pixels of the largest patches; that of `model.config`, or 64.

    Returns:
        `patch_scores` for the "precomputed" scorer: one (batch, rows, columns) tensor for each size of patch that can
        be split, largest first.

    Raises:
        ValueError: for labels or sizes that do not fit, or a model whose activations cannot be found.

    Source: arXiv 2304.00287, section 5.
    """
    config = getattr(model, "config", None)
    min_patch_size = min_patch_size or getattr(config, "min_patch_size", 16)
    max_patch_size = max_patch_size or getattr(config, "max_patch_size", 64)
    levels = count_levels(min_patch_size, max_patch_size)
    height, width = pixel_values.shape[-2:]
    check_multiple((height, width), max_patch_size, "max_patch_size")
    batch = pixel_values.shape[0]
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"`labels` must have the shape {(batch,)}, one class per image; got {tuple(labels.shape)}.")
    is_quadtree = isinstance(config, QuadtreeViTConfig)
    budget = {"num_tokens": config.num_tokens_range((height, width))[1]} if is_quadtree else {}

    with torch.enable_grad():
        # Gradients must reach the activations even when every parameter is frozen.
        pixel_values = pixel_values.detach().requires_grad_()
        features, logits, output = _features_and_logits(model, pixel_values, target_layer, budget)
        (gradients,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
    features, gradients = features.detach().float(), gradients.float()
    if features.ndim == 3:
        features, gradients = features.transpose(1, 2), gradients.transpose(1, 2)  # (batch, width, tokens)
        heat = _tokens_to_map(features, gradients, output if is_quadtree else None, config, (height, width))
    else:
        heat = _heat_map(features, gradients)
    heat = heat / heat.flatten(1).amax(dim=1).clamp(min=torch.finfo(heat.dtype).tiny)[:, None, None]
    rows, columns = height // min_patch_size, width // min_patch_size
    heat = resize_bilinear(heat[:, None], (rows, columns))[:, 0]
    grids = [(batch, rows >> shift, columns >> shift) for shift in range(levels - 1, 0, -1)]
    return [average_to_grid(heat, grid, "heat") for grid in grids]


def _tokens_to_map(
    features: torch.Tensor, gradients: torch.Tensor, output: object, config: object, image_size: tuple[int, int]
) -> torch.Tensor:
    """Grad-CAM of patch tokens (batch, width, tokens), prefix tokens first -> (batch, rows, columns)"""
    if output is not None:
        prefix = config.num_prefix_tokens
        heat = _heat_map(features[..., prefix:], gradients[..., prefix:])[..., None]
        sizes = (image_size, config.min_patch_size)
        return reverse_quadtree(heat, output.patch_centers, output.patch_sizes, *sizes)[:, 0]
    num_tokens = features.shape[2]
    patch_size = getattr(config, "patch_size", None)
    if hasattr(config, "patch_grid_for"):
        rows, columns = config.patch_grid_for(image_size)
    elif isinstance(patch_size, int):
        rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    else:
        rows = columns = int(num_tokens**0.5)
    prefix = num_tokens - rows * columns
    if prefix < 0:
        raise ValueError(
            f"The {num_tokens} tokens of `target_layer` are fewer than the {rows} x {columns} patches of the image."
        )
    return _heat_map(features[..., prefix:], gradients[..., prefix:]).unflatten(1, (rows, columns))


__all__ = ["gradcam_oracle"]
