"""What every image processor asks of its input, whichever backend it has."""

import numpy as np
import torch


class FiniteImagesMixin:
    """Refuses pictures that hold NaN or infinity. Goes in front of transformers' torchvision or PIL backend.

    Raises:
        ValueError: from the call of the processor, before anything is resized.
    """

    def process_image(self, *args, **kwargs) -> np.ndarray | torch.Tensor:
        image = super().process_image(*args, **kwargs)
        is_tensor = isinstance(image, torch.Tensor)
        if is_tensor and image.is_floating_point() and image.device.type == "cpu":
            finite = bool(torch.isfinite(image).all())
        elif not is_tensor and np.issubdtype(image.dtype, np.floating):
            finite = bool(np.isfinite(image).all())
        else:
            finite = True  # integers always are; a picture on a GPU is not worth a synchronisation
        if not finite:
            raise ValueError(
                "`images` holds NaN or infinite pixel values: expected finite numbers. Check how the picture was made "
                f"(its shape, channels first, is {tuple(image.shape)})."
            )
        return image


__all__ = ["FiniteImagesMixin"]
