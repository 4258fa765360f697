"""FlexiViT configuration."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from ...layers.config_checks import checked_config, pixel_size
from ...layers.encoder_config import EncoderConfig
from ...layers.token_budget import plain_size
from ...utils.validation import check_int, to_pair


_PAIRS = (list, tuple)  # PyTorch 2.8 does not trace `list | tuple`


@checked_config
class FlexiViTConfig(EncoderConfig):
    """Configuration of a FlexiViT: a ViT whose patch kernel and positions are resized to the patch size of each call.

    The defaults are FlexiViT-B of the paper (240 px, 32 x 32 kernel, 7 x 7 positions). All sizes are (height, width)
    in pixels, or an int for both. The other fields are those of `EncoderConfig`.

    Args:
        image_size (`int` or `(height, width)`, *optional*, defaults to 240): the size the positions were made for.
        base_patch_size (`int` or `(height, width)`, *optional*, defaults to 32): size of the stored patch kernel.
        patch_size (`int` or `(height, width)`, *optional*): patch size of a call that names none; `base_patch_size`
            when `None`.
        train_patch_sizes (`list`, *optional*): sizes to draw from in training when the call names none; `None` means
            no drawing. A compiled model draws between graphs: with `fullgraph=True`, name the size in the call or
            train with `polyscale.training.PatchSizeCallback`.
        train_patch_size_probs (`list[float]`, *optional*): a probability for each of `train_patch_sizes`; uniform when
            `None`.
        resize_method (`str`, *optional*, defaults to `"pi"`): `"pi"` (pseudo-inverse resize) or `"interpolate"` (plain
            resize) of the kernel.
        kernel_interpolation (`str`, *optional*, defaults to `"bilinear"`): `"bilinear"` or `"bicubic"`, of the image
            resize that the kernel resize follows.
        kernel_antialias (`bool`, *optional*, defaults to `False`): whether that resize is antialiased. FlexiViT's
            released weights: bilinear, not antialiased; ordinary ViTs resized afterwards: bicubic, antialiased.
        position_interpolation (`str`, *optional*, defaults to `"bilinear"`): `"bilinear"` or `"bicubic"`, for the
            position grid.
        position_antialias (`bool`, *optional*, defaults to `True`): whether a resize of the position grid to a smaller
            one is antialiased.
        position_grid (`int` or `(rows, columns)`, *optional*): of the stored positions; `image_size //
            base_patch_size` when `None`.
        remainder (`str`, *optional*, defaults to `"crop"`): what to do with an image that the patch size does not
            divide: `"crop"` drops the rest at the bottom and the right (as published), `"pad"` pads with zeros there,
            `"error"` raises a ValueError. Older checkpoints call it `uneven`.
        patch_bias (`bool`, *optional*, defaults to `True`): whether the patch embedding has a bias.

    Raises:
        ValueError: for an unknown name or choice, a size below 1, or probabilities that do not fit the sizes.

    Example:

    ```python
    >>> from polyscale import FlexiViTConfig, FlexiViTModel

    >>> config = FlexiViTConfig.preset("flexivit_small", patch_size=30)
    >>> config.num_tokens_for((240, 240))
    64
    >>> config.patch_size_for((240, 240), num_tokens=225)
    16
    ```
    """

    model_type = "flexivit"
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "token_mask"]
    budget_argument = "patch_size"
    changeable_fields = ("patch_size", "num_tokens", "image_size")

    attribute_map = {**EncoderConfig.attribute_map, "uneven": "remainder"}

    image_size: int | list[int] | tuple[int, int] = pixel_size(240)
    base_patch_size: int | list[int] | tuple[int, int] = pixel_size(32)
    patch_size: int | list[int] | tuple[int, int] | None = pixel_size(None)
    train_patch_sizes: list | tuple | None = None
    train_patch_size_probs: list | tuple | None = None
    resize_method: Literal["pi", "interpolate"] = "pi"
    kernel_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    kernel_antialias: bool = False
    position_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    position_antialias: bool = True
    position_grid: int | list[int] | tuple[int, int] | None = pixel_size(None)
    remainder: Literal["crop", "pad", "error"] = "crop"
    patch_bias: bool = True

    def __post_init__(self, **kwargs):
        image_size = to_pair(self.image_size, "image_size")
        base_patch_size = to_pair(self.base_patch_size, "base_patch_size")
        if self.position_grid is None:
            if base_patch_size[0] > image_size[0] or base_patch_size[1] > image_size[1]:
                raise ValueError(
                    f"`base_patch_size` {base_patch_size} is larger than `image_size` {image_size}: give the "
                    "`position_grid` (rows, columns) too."
                )
            self.position_grid = [image_size[0] // base_patch_size[0], image_size[1] // base_patch_size[1]]
        self.position_grid = list(to_pair(self.position_grid, "position_grid"))
        super().__post_init__(**kwargs)

    def validate_train_patch_sizes(self) -> None:
        """Rules between fields; transformers runs this when a config is made and saved."""
        sizes, probs = self.train_patch_sizes, self.train_patch_size_probs
        if sizes is None:
            if probs is not None:
                raise ValueError("`train_patch_size_probs` needs `train_patch_sizes`: one probability for each size.")
            return
        if len(sizes) == 0:
            raise ValueError("`train_patch_sizes` is empty: give at least one size, or None for no drawing.")
        for size in sizes:
            to_pair(size, "train_patch_sizes")
        if probs is not None:
            if len(probs) != len(sizes):
                raise ValueError(
                    "`train_patch_size_probs` must hold one probability for each of `train_patch_sizes`, got "
                    f"{len(probs)} for {len(sizes)} sizes."
                )
            if any(isinstance(prob, bool) or not isinstance(prob, int | float) for prob in probs):
                raise ValueError(f"`train_patch_size_probs` must hold numbers, got {list(probs)}.")
            if min(probs) < 0 or abs(sum(probs) - 1) > 1e-4:
                raise ValueError(f"`train_patch_size_probs` must be non-negative and sum to 1, got {list(probs)}.")

    def resolve_patch_size(self, patch_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """(height, width) of a patch in evaluation: the given one, else `patch_size`, else `base_patch_size`."""
        if patch_size is None:
            patch_size = self.base_patch_size if self.patch_size is None else self.patch_size
        return to_pair(patch_size, "patch_size")

    def patch_sizes_of(
        self, patch_size: int | Sequence[int] | Sequence[Sequence[int]] | None, batch: int
    ) -> list[tuple[int, int]] | None:
        """(height, width) of the patches of each image, where `patch_size` holds one for each; else None.

        Raises:
            ValueError: for a list of another length than `batch`, the number of images, or of ints instead of pairs.
        """
        if not isinstance(patch_size, _PAIRS):
            return None
        if not [size for size in patch_size if isinstance(size, _PAIRS)]:
            if len(patch_size) == batch != 2:
                raise ValueError(
                    f"`patch_size` must be an int, (height, width), or a list of one (height, width) for each of the "
                    f"{batch} images, got {list(patch_size)}: give {[(size, size) for size in patch_size]}."
                )
            return None
        if len(patch_size) != batch:
            raise ValueError(
                f"`patch_size` must be an int, (height, width), or a list of one (height, width) for each of the "
                f"{batch} images, got {len(patch_size)} of them."
            )
        return [to_pair(size, "patch_size") for size in patch_size]

    def patch_grid_for(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> tuple[int, int]:
        """(rows, columns) of patches that an image is cut into.

        Args:
            image_size: (height, width) in pixels, or int; `config.image_size` when None.
            patch_size: (height, width) in pixels, or int; as in `resolve_patch_size` when None.

        Raises:
            ValueError: for a patch below 1 pixel or larger than the image, or, with `remainder="error"`, one that does
                not divide it.
        """
        height, width = to_pair(self.image_size if image_size is None else image_size, "image_size")
        patch_height, patch_width = self.resolve_patch_size(patch_size)
        if patch_height > height or patch_width > width:
            raise ValueError(
                f"`patch_size` must not be larger than the image: got {(patch_height, patch_width)} for an image of "
                f"{(height, width)} pixels (height, width)."
            )
        if self.remainder == "error" and (height % patch_height or width % patch_width):
            raise ValueError(
                f"`patch_size` {(patch_height, patch_width)} does not divide the image of {(height, width)} pixels "
                "(height, width), and `config.remainder` is 'error'. Use 'crop' or 'pad', or another size."
            )
        if self.remainder == "pad":
            return -(-height // patch_height), -(-width // patch_width)
        return height // patch_height, width // patch_width

    def token_grid_for(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> tuple[int, int]:
        """(rows, columns) of the tokens: those of the patches; `None` where tokens are merged. Arguments and errors:
        `patch_grid_for`.
        """
        grid = self.patch_grid_for(image_size, patch_size)
        return grid if self.num_tokens_for(image_size, patch_size) == math.prod(grid) else None

    def num_tokens_for(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> int:
        """How many tokens an image costs, prefix tokens not counted. Arguments and errors: `patch_grid_for`, and a
        ValueError for more patches than the layers can merge down to `merge_tokens_to`.
        """
        return self.tokens_after_merging(math.prod(self.patch_grid_for(image_size, patch_size)))

    def default_budgets(self) -> list[int | list[int]]:
        """The patch sizes it was trained with, smallest first and each once, else its own one."""
        sizes = {to_pair(size, "patch_size") for size in self.train_patch_sizes or [self.resolve_patch_size()]}
        return [plain_size(size) for size in sorted(sizes, key=lambda size: (math.prod(size), size))]

    def parse_budget(self, text: str) -> int | tuple[int, int]:
        """A patch size as a user types it: "16", or height and width, "10x15".

        Raises:
            ValueError: for any other text.
        """
        numbers = text.lower().split("x")
        if len(numbers) > 2 or not all(number.strip().lstrip("-").isdecimal() for number in numbers):
            raise ValueError(f"`budgets` of a FlexiViT must be patch sizes such as 16 or 10x15, got {text!r}.")
        return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))

    def format_budget(self, budget: int | Sequence[int]) -> str:
        """The text that `parse_budget` reads as `budget`."""
        return str(budget) if isinstance(budget, int) else "x".join(map(str, budget))

    def hosted(self) -> tuple["FlexiViTConfig", list[str]]:
        """A copy at one patch size: a host counts the tokens before the model could draw one."""
        hosted, notes = super().hosted()
        hosted.patch_size = list(self.resolve_patch_size())
        if self.train_patch_sizes is not None:
            hosted.train_patch_sizes = hosted.train_patch_size_probs = None
            notes.append(
                f"It no longer draws its patch size in training (`train_patch_sizes` was {self.train_patch_sizes}): "
                f"its tokens could not be counted. It runs at `patch_size` {plain_size(hosted.patch_size)} until told "
                "otherwise."
            )
        return hosted, notes

    def budget_code(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """(height, width) of the patches."""
        return self.resolve_patch_size()

    def budget_from_code(self, code: Sequence[int], num_tokens: int) -> dict[str, Any]:
        return {"patch_size": tuple(code)}

    def budget_calls(
        self, codes: Sequence[tuple[int, ...]], counts: Sequence[int]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """One forward of all images, whatever their patch sizes; one for each budget where tokens are merged, which
        padding would be too. Arguments: `TokenBudgetMixin.budget_calls`.
        """
        if len(set(codes)) < 2 or self.merge_tokens_to is not None:
            return super().budget_calls(codes, counts)
        return [(list(range(len(codes))), {"patch_size": list(codes)})]

    def cheaper_budget(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> dict[str, Any] | None:
        """Twice the patch size, for a quarter of the tokens; `None` where such patches are larger than the image.

        Arguments and errors: `patch_grid_for`.
        """
        height, width = to_pair(self.image_size if image_size is None else image_size, "image_size")
        doubled = tuple(2 * side for side in self.resolve_patch_size(patch_size))
        return {"patch_size": doubled} if doubled[0] <= height and doubled[1] <= width else None

    def resolve_budget(self, **changes) -> dict[str, Any]:
        """The fields; `num_tokens` becomes the `patch_size` whose token count is nearest."""
        fields = dict(changes)
        if "num_tokens" in fields:
            if "patch_size" in fields:
                raise ValueError("Give either `patch_size` or `num_tokens`, not both: each gives the other.")
            fields["patch_size"] = self.patch_size_for(fields.get("image_size"), fields.pop("num_tokens"))
        return fields

    def budget_for_share(self, image_size: int | Sequence[int] | None, share: float) -> int:
        """The patch size whose tokens are nearest to a share of those of the smallest patches trained with.

        Arguments: `TokenBudgetMixin.budget_for_share`.
        """
        full = self.num_tokens_for(image_size, self.default_budgets()[0])
        return self.patch_size_for(image_size, max(round(full * share), 1))

    def patch_size_for(self, image_size: int | Sequence[int] | None, num_tokens: int) -> int:
        """The square patch size whose token count is nearest to `num_tokens`; of two, the one that costs fewer tokens.

        Among sizes of equal cost, one that divides the image is preferred, then the largest.

        Args:
            image_size: (height, width) in pixels, or int; `config.image_size` when None.
            num_tokens: the budget, at least 1 and at most one token per pixel.

        Raises:
            ValueError: for a budget out of that range.
        """
        height, width = to_pair(self.image_size if image_size is None else image_size, "image_size")
        if not 1 <= check_int("num_tokens", num_tokens) <= height * width:
            raise ValueError(
                f"`num_tokens` must be between 1 and {height * width} for an image of {(height, width)} pixels, "
                f"got {num_tokens}."
            )

        def badness(size: int) -> tuple:
            pad = self.remainder == "pad"
            rows, columns = (-(-side // size) if pad else side // size for side in (height, width))
            has_remainder = height % size != 0 or width % size != 0
            return abs(rows * columns - num_tokens), rows * columns, has_remainder, -size

        sizes = range(1, min(height, width) + 1)
        if self.remainder == "error":
            sizes = [size for size in sizes if height % size == 0 and width % size == 0]
        return min(sizes, key=badness)


__all__ = ["FlexiViTConfig"]
