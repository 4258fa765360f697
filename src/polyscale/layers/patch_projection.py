"""The patch projection of a ViT: a convolution that is called with the patch size, and resizes its own kernel.

A module that is called can be hooked, offloaded, quantised and wrapped like any other.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .freezing import FreezableMixin, takes_gradients
from .resizing import KernelResize, resize_patches


class PatchProjection(FreezableMixin, nn.Conv2d):
    """Cuts images into patches and embeds them, at any patch size.

    The arguments are those of `nn.Conv2d`, which adapters make more of by the class of what they wrap; the stride is
    the kernel size.
    """

    frozen_tensors = ("frozen_kernel",)

    def kernel_for(self, patch_size: tuple[int, int], resize: KernelResize) -> torch.Tensor:
        """(hidden, channels, *patch_size), always made from the stored kernel: chained resizes lose information."""
        if patch_size == self.kernel_size:
            return self.weight
        frozen = self.frozen_kernel
        is_kept = frozen is not None and frozen.shape[-2:] == patch_size and resize == self.frozen_resize
        if is_kept and not takes_gradients(self.weight):
            return frozen
        return resize(self.weight, patch_size)

    @torch.no_grad()
    def freeze(self, patch_size: tuple[int, int], resize: KernelResize) -> None:
        """Keeps the kernel of a patch size; a frozen budget asks for it."""
        self.frozen_kernel = None
        if patch_size != self.kernel_size:
            self.frozen_kernel = self.kernel_for(patch_size, resize).clone()
            self.frozen_resize = resize

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_size: tuple[int, int] | None = None,
        resize: KernelResize | None = None,
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor`): (batch, channels, height, width).
            patch_size (`tuple[int, int]`, *optional*): (height, width) in pixels; the kernel's own when `None`.
            resize (`KernelResize`, *optional*): how the kernel is resized to another size.

        Returns:
            `torch.Tensor`: (batch, hidden, rows, columns), without an incomplete last row or column of patches.
        """
        kernel = self.kernel_for(patch_size or self.kernel_size, resize or KernelResize())
        height, width = kernel.shape[-2:]
        rows, columns = pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
        patches = cut_patches(pixel_values.to(kernel.dtype), rows, columns, height, width)
        tokens = F.linear(patches, kernel.flatten(1), self.bias)  # (batch, rows * columns, hidden)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def cut_patches(pixel_values: torch.Tensor, rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    """(batch, channels, at least rows * height, at least columns * width) -> (batch, rows * columns, pixels)

    One product with such a matrix is faster than a convolution: the kernel is new in each call, and convolutions take
    time to bring a new one into their own order.
    """
    patches = pixel_values[..., : rows * height, : columns * width]
    patches = patches.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def project_patches(
    projection: nn.Module,
    pixel_values: torch.Tensor,
    patch_size: tuple[int, int],
    kernel_size: Sequence[int],
    resize: KernelResize,
) -> torch.Tensor:
    """Calls a patch projection at a patch size, whatever has been put around it.

    What stands in the place of a `PatchProjection`, a LoRA layer around it for instance, knows its stored patch size
    alone. So the patches are resized to that size: a resized kernel's product with a patch is the stored kernel's
    product with the patch resized by the transposed matrices.

    Args:
        projection (`nn.Module`): a `PatchProjection`, or a module in its place.
        pixel_values (`torch.Tensor`): (batch, channels, height, width).
        patch_size (`tuple[int, int]`): (height, width) in pixels.
        kernel_size (`Sequence[int]`): (height, width) of the stored kernel, in pixels.
        resize (`KernelResize`): how the kernel is resized.

    Returns:
        `torch.Tensor`: (batch, hidden, rows, columns).
    """
    if isinstance(projection, PatchProjection):
        return projection(pixel_values, patch_size, resize)
    return projection(resize_patches(pixel_values, patch_size, tuple(kernel_size), resize))


__all__ = ["PatchProjection", "project_patches"]
