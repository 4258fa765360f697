"""Quadtree ViT configuration."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedConfig

from ...layers.config_checks import checked_config, choice, non_negative, pixel_size, positive
from ...layers.encoder_config import EncoderConfig
from ...utils.transformers_internals import sub_config
from ...utils.validation import to_pair
from .selection_quadtree_vit import check_multiple, check_token_budget, quadtree_tokens


if TYPE_CHECKING:
    from .scoring_quadtree_vit import PatchScorer


# Name -> function (config) -> scorer, which `register_patch_scorer` fills in.
PATCH_SCORERS: dict[str, Callable | None] = dict.fromkeys(
    ("pixel_blur", "feature", "random", "precomputed", "embedding", "entropy")
)
REDUCTIONS = ("bilinear", "antialias")
SCORER_ERRORS = ("mse", "cosine")
# The budget of the paper's default, 196 of the 256 patches of 16 pixels in an image of 256 pixels.
DEFAULT_BUDGET = 196 / 256


def count_levels(min_patch_size: int, max_patch_size: int) -> int:
    """Number of patch sizes from `max_patch_size` to `min_patch_size`, each half of the one before.

    Raises:
        ValueError: unless `max_patch_size` is `min_patch_size` times a power of two.
    """
    for name, size in (("min_patch_size", min_patch_size), ("max_patch_size", max_patch_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` must be an int of at least 1 (pixels), got {size!r}.")
    ratio = max_patch_size // min_patch_size
    if ratio < 1 or max_patch_size % min_patch_size or ratio & (ratio - 1):
        power = 1 << max(ratio, 1).bit_length() - 1
        raise ValueError(
            f"`max_patch_size` must be `min_patch_size` times a power of two (1, 2, 4, ...), got {max_patch_size} for "
            f"{min_patch_size}; for example {min_patch_size * power} or {min_patch_size * power * 2}."
        )
    return ratio.bit_length()


@checked_config
class QuadtreeViTConfig(EncoderConfig):
    """Configuration of a Quadtree ViT: small patches where the image is busy, large ones elsewhere.

    The defaults are the paper's Quadformer-B: images of 256 px, patches of 64, 32 and 16 px, 196 tokens; its main
    scorer is "feature", which needs a pretrained network. All sizes are (height, width) in pixels, or an int for both.
    The other fields are those of `EncoderConfig`.

    Args:
        image_size (`int` or `(height, width)`, *optional*, defaults to 256): the size that budgets are made for.
        min_patch_size (`int`, *optional*, defaults to 16): side in pixels of the smallest patches; every patch is
            reduced to it before it is embedded.
        max_patch_size (`int`, *optional*, defaults to 64): side in pixels of the largest patches: `min_patch_size`
            times a power of two. The height and width of an image must be multiples of it. Equal to `min_patch_size`:
            a plain ViT.
        num_tokens (`int`, *optional*): tokens per image, prefix tokens not counted: (height / max) (width / max) + 3
            k. With `split_threshold` it is the maximum. When neither is given: 196/256 of the smallest patches of
            `image_size`.
        split_threshold (`float`, *optional*): patches whose score is higher are split, so that each image has its own
            number of tokens. In units of the scorer, which sees normalised pixels.
        round_num_tokens (`bool`, *optional*, defaults to `False`): whether a budget that no number of splits gives is
            rounded down, rather than refused.
        patch_scorer (`str`, *optional*, defaults to `"pixel_blur"`): `"pixel_blur"`, `"feature"`, `"random"`,
            `"precomputed"` (the call's `patch_scores`, which any scorer yields to when they are given),
            `"embedding"` (spread of the model's own patch embeddings), `"entropy"` (of grey levels, as in APT), or a
            name given to `register_patch_scorer`.
        scorer_stride (`int`, *optional*, defaults to 32): stride in pixels of the network of the `"feature"` scorer:
            32 or 16 (its first part).
        scorer_error (`str`, *optional*, defaults to `"mse"`): how that scorer compares features: `"mse"` or
            `"cosine"`.
        scorer_seed (`int`, *optional*): seed of the `"random"` scorer; new scores in every call when `None`.
        scorer_backbone_config (`PreTrainedConfig` or `dict`, *optional*): of a transformers backbone for the
            `"feature"` scorer (its last feature map is used); ShuffleNetV2 x0.5 when `None`.
        scorer_image_mean (`float` or `list[float]`, *optional*, defaults to 0.5): of the normalisation of pixels,
            which the `"entropy"` scorer undoes.
        scorer_image_std (`float` or `list[float]`, *optional*, defaults to 0.5): likewise.
        reduction (`str`, *optional*, defaults to `"bilinear"`): how large patches are made smaller: `"bilinear"` (as
            published: the 4 middle pixels of a cell) or `"antialias"` (all of its pixels).
        area_attention (`float`, *optional*, defaults to 0.0): weight of the logarithm of a token's area, in smallest
            patches, in the attention that it gets; 1 counts a patch as often as the small ones in its place.
        area_pooling (`bool`, *optional*, defaults to `False`): whether a mean over the tokens is weighted by area.
        large_patch_embedding (`str`, *optional*, defaults to `"resize"`): `"resize"`, or `"aggregate"`: to the
            embedding of the reduced patch comes one made from the embeddings of its smallest parts (as in APT,
            arXiv 2510.18091), through a layer of weights that start at zero.
        merge_layer (`int`, *optional*, defaults to 0): layers that run on all smallest patches before large ones take
            the place of those whose features are alike; 0 chooses patches by their pixels, as published.
        position_embedding (`str`, *optional*, defaults to `"sinusoidal"`): `"sinusoidal"` (of the patch centres) or
            `"learned"` (a grid, sampled bilinearly at the patch centres).
        position_grid (`int` or `(rows, columns)`, *optional*): of the learned grid; `image_size // min_patch_size`
            when `None`.
        patch_bias (`bool`, *optional*, defaults to `True`): whether the patch embedding has a bias.

    Raises:
        ValueError: for an unknown name or choice, sizes that do not divide each other, or a width that does not fit
            sinusoids.

    Example:

    ```python
    >>> from polyscale import QuadtreeViTConfig, QuadtreeViTModel

    >>> config = QuadtreeViTConfig.preset("quadtree_vit_small", num_tokens=100)
    >>> config.num_tokens_range((256, 256))
    (16, 256)
    ```
    """

    model_type = "quadtree_vit"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "patch_centers",
        "patch_sizes",
        "token_mask",
        "split_scores",
    ]
    budget_argument = "num_tokens"
    changeable_fields = ("num_tokens", "split_threshold", "image_size")
    sub_configs_defaults = {"scorer_backbone_config": sub_config("resnet", optional=True)}

    image_size: int | list[int] | tuple[int, int] = pixel_size(256)
    min_patch_size: int = positive(16)
    max_patch_size: int = positive(64)
    num_tokens: int | None = positive(None)
    split_threshold: float | int | None = None
    round_num_tokens: bool = False
    patch_scorer: str = choice(
        PATCH_SCORERS, "pixel_blur", "one of your own is made known by `polyscale.register_patch_scorer` first"
    )
    scorer_stride: int = positive(32)
    scorer_error: str = choice(SCORER_ERRORS, "mse")
    scorer_seed: int | None = None
    scorer_backbone_config: dict | PreTrainedConfig | None = None
    scorer_image_mean: float | int | list | tuple = 0.5
    scorer_image_std: float | int | list | tuple = 0.5
    reduction: str = choice(REDUCTIONS, "bilinear")
    area_attention: float | int = non_negative(0.0)
    area_pooling: bool = False
    large_patch_embedding: Literal["resize", "aggregate"] = "resize"
    merge_layer: int = non_negative(0)
    position_embedding: Literal["sinusoidal", "learned"] = "sinusoidal"
    position_grid: int | list[int] | tuple[int, int] | None = pixel_size(None)
    patch_bias: bool = True

    def __post_init__(self, **kwargs):
        count_levels(self.min_patch_size, self.max_patch_size)
        coarsest, finest = self.num_tokens_range(self.image_size)
        if self.num_tokens is None and self.split_threshold is None:
            self.num_tokens = check_token_budget(max(int(finest * DEFAULT_BUDGET), coarsest), coarsest, finest, True)
        if self.position_grid is None:
            height, width = to_pair(self.image_size, "image_size")
            self.position_grid = [height // self.min_patch_size, width // self.min_patch_size]
        self.position_grid = list(to_pair(self.position_grid, "position_grid"))
        super().__post_init__(**kwargs)

    def validate_patch_sizes(self) -> None:
        """Rules between fields; transformers runs this when a config is made and saved."""
        self.num_tokens_range(self.image_size)
        if self.position_embedding == "sinusoidal" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 and at least 8 for sinusoidal positions, got "
                f"{self.hidden_size}."
            )

    @property
    def patch_size(self) -> int:
        """Pixels per place of the dense feature maps along a side, for heads that ask for it: `min_patch_size`."""
        return self.min_patch_size

    @property
    def num_levels(self) -> int:
        """Number of patch sizes."""
        return count_levels(self.min_patch_size, self.max_patch_size)

    @property
    def num_position_prefix_tokens(self) -> int:
        """Prefix tokens that have a position."""
        return 0 if self.position_embedding == "sinusoidal" else super().num_position_prefix_tokens

    def patch_grid_for(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """(rows, columns) of the largest patches.

        Args:
            image_size: (height, width) in pixels, or int; `config.image_size` when None.

        Raises:
            ValueError: for a size that is no multiple of `max_patch_size`; it names the nearest ones that are.
        """
        height, width = to_pair(self.image_size if image_size is None else image_size, "image_size")
        check_multiple((height, width), self.max_patch_size, "max_patch_size")
        return height // self.max_patch_size, width // self.max_patch_size

    def num_tokens_range(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """The smallest and the largest budget; legal ones lie 3 apart. Arguments and errors: `patch_grid_for`."""
        rows, columns = self.patch_grid_for(image_size)
        return rows * columns, rows * columns * 4 ** (self.num_levels - 1)

    def budget_ladder(self, image_size: int | Sequence[int] | None = None) -> list[int]:
        """Up to eight numbers of tokens, from the coarsest to the finest cut: the same weights run at all."""
        coarsest, finest = self.num_tokens_range(image_size)
        splits = (finest - coarsest) // 3
        steps = min(splits, 7)
        return [coarsest + 3 * (splits * step // max(steps, 1)) for step in range(steps + 1)]

    def num_tokens_for(
        self, image_size: int | Sequence[int] | None = None, num_tokens: int | None = None
    ) -> int | None:
        """How many tokens an image costs, prefix tokens not counted; None where that depends on the image.

        Args:
            image_size: (height, width) in pixels, or int; `config.image_size` when None.
            num_tokens: a budget; as the config says when None.

        Raises:
            ValueError: for an illegal size or budget (it names the nearest legal ones), or one that the layers cannot
                merge down to `merge_tokens_to`.
        """
        if num_tokens is None and self.split_threshold is not None:
            return None
        return self.max_num_tokens_for(image_size, num_tokens)

    @property
    def tokens_vary(self) -> bool:
        """Whether each image has its own number of tokens: with `split_threshold`."""
        return self.split_threshold is not None

    def max_num_tokens_for(self, image_size: int | Sequence[int] | None = None, num_tokens: int | None = None) -> int:
        """The most tokens that an image can cost. Arguments and errors: `num_tokens_for`."""
        coarsest, finest = self.num_tokens_range(image_size)
        if num_tokens is None:
            num_tokens = self.num_tokens
        if num_tokens is None:
            return finest
        return self.tokens_after_merging(check_token_budget(num_tokens, coarsest, finest, self.round_num_tokens))

    @property
    def num_merging_layers(self) -> int:
        """Layers in which tokens merge, where they do: those behind `merge_layer`."""
        first = min(self.merge_layer, self.num_hidden_layers) if self.num_levels > 1 else 0
        return max(super().num_merging_layers - first, 0)

    def feature_grid_for(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """(rows, columns) of the dense feature maps: the smallest patches. Arguments and errors: `patch_grid_for`."""
        height, width = to_pair(self.image_size if image_size is None else image_size, "image_size")
        self.patch_grid_for((height, width))
        return height // self.min_patch_size, width // self.min_patch_size

    def image_processor_fields(self) -> dict[str, Any]:
        return {"max_patch_size": self.max_patch_size}

    def budget_code(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """None: the number of tokens says it all, unless tokens are merged: then the number before."""
        return () if self.merge_tokens_to is None else (self.num_tokens,)

    def budget_from_code(self, code: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """The count decides, not the threshold: scores in half precision may differ from those that were counted."""
        before_merging = code[0] if code else 0
        return {"num_tokens": before_merging or num_tokens}

    def budget_calls(
        self, codes: Sequence[tuple[int, ...]], counts: Sequence[int]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """One forward of all images, whatever their counts; one for each budget where tokens are merged, which
        padding would be too. Arguments: `TokenBudgetMixin.budget_calls`.
        """
        if len(set(counts)) < 2 or self.merge_tokens_to is not None:
            return super().budget_calls(codes, counts)
        return [(list(range(len(counts))), {"num_tokens": list(counts)})]

    def count_images(
        self, pixel_values: Sequence[torch.Tensor], image_sizes: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, tuple[int, ...]]]:
        """With a threshold: what the scorer says. Arguments: `TokenBudgetMixin.count_images`.

        Raises:
            ValueError: for a threshold and a scorer that has weights, which are not at hand here.
        """
        if not self.tokens_vary:
            return super().count_images(pixel_values, image_sizes)
        scorer = self._pixel_scorer()
        counts = []
        for image in pixel_values:
            selected = quadtree_tokens(scorer(image[None]), self.num_tokens, self.split_threshold)
            counts.append((int(selected.mask.sum()), ()))
        return counts

    def _pixel_scorer(self) -> "PatchScorer":
        """The scorer of a config with a threshold, if pixels are all it needs."""
        from .patch_scorers_quadtree_vit import make_patch_scorer  # which imports this module, as does the next
        from .scoring_quadtree_vit import PrecomputedPatchScorer

        scorer = make_patch_scorer(self)
        needs_more = any(True for _ in scorer.parameters()) or getattr(scorer, "reads_embeddings", False)
        if needs_more or isinstance(scorer, PrecomputedPatchScorer):
            raise ValueError(
                f"`split_threshold` with `patch_scorer={self.patch_scorer!r}` cannot be used in a host model: it "
                "counts the tokens of an image from its pixels alone, before the model sees it. Use "
                "`patch_scorer='pixel_blur'`, or a fixed `num_tokens`."
            )
        return scorer

    def hosted(self) -> tuple["QuadtreeViTConfig", list[str]]:
        """Raises ValueError for a threshold and a scorer whose scores a processor cannot compute."""
        if self.tokens_vary:
            if self.merge_layer:
                raise ValueError(
                    f"`split_threshold` with `merge_layer={self.merge_layer}` cannot be used in a host model: it "
                    "counts the tokens of an image before the model sees it. Use `merge_layer=0`, or a fixed "
                    "`num_tokens`."
                )
            if self.merge_tokens_to is not None:
                raise ValueError(
                    f"`split_threshold` with `merge_tokens_to={self.merge_tokens_to}` cannot be used in a host model: "
                    "images with token counts of their own are padded, and padding would be merged. Use one of them."
                )
            self._pixel_scorer()
        return super().hosted()

    def cheaper_budget(
        self, image_size: int | Sequence[int] | None = None, num_tokens: int | None = None
    ) -> dict[str, Any] | None:
        """About a quarter of the tokens; `None` where there is no such budget. Arguments: `num_tokens_for`."""
        coarsest, finest = self.num_tokens_range(image_size)
        usual = num_tokens or self.num_tokens or finest
        usual = check_token_budget(usual, coarsest, finest, self.round_num_tokens)
        cheaper = check_token_budget(max(usual // 4, coarsest), coarsest, finest, True)
        return {"num_tokens": cheaper} if cheaper < usual else None

    def budget_for_share(self, image_size: int | Sequence[int] | None, share: float) -> int:
        """The legal number of tokens nearest to a share of those of the smallest patches.

        Arguments: `TokenBudgetMixin.budget_for_share`.
        """
        coarsest, finest = self.num_tokens_range(image_size)
        return min(max(coarsest + 3 * round((share * finest - coarsest) / 3), coarsest), finest)

    def resolve_budget(self, **changes) -> dict[str, Any]:
        """The fields; `num_tokens` alone ends a threshold."""
        if "image_size" in changes:
            self.num_tokens_range(changes["image_size"])
        if "num_tokens" in changes and "split_threshold" not in changes:
            return {**changes, "split_threshold": None}
        return dict(changes)


__all__ = ["QuadtreeViTConfig", "count_levels"]
