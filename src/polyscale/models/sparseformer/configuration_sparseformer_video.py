"""SparseFormer configuration for videos."""

from ...layers.config_checks import checked_config, positive
from .configuration_sparseformer import SparseFormerConfig


@checked_config
class SparseFormerVideoConfig(SparseFormerConfig):
    """Configuration of a SparseFormer on videos, with RoIs in space and time (the authors' MediaSparseFormer).

    The other fields, and `preset`, are those of `SparseFormerConfig`.

    Args:
        replicates (`int`, *optional*, defaults to 4): copies of the `num_latent_tokens` tokens along time; at first
            each copy sees 1 / replicates of the video.
        num_frames (`int`, *optional*, defaults to 8): frames that a video processor or a pipeline samples from a
            video. The model takes any number.

    Raises:
        ValueError: as in `SparseFormerConfig`, and for `replicates` or `num_frames` below 1.
    """

    model_type = "sparseformer_video"

    replicates: int = positive(4)
    num_frames: int = positive(8)

    @property
    def num_tokens(self) -> int:
        """Tokens that a video costs, `replicates * num_latent_tokens`; CLS is not counted."""
        return self.replicates * self.num_latent_tokens

    @property
    def roi_dimensions(self) -> int:
        """Dimensions of a RoI: 3."""
        return 3


__all__ = ["SparseFormerVideoConfig"]
