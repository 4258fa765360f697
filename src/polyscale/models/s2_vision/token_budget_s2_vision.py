"""What an S2 config says about its budgets inside of a host model, and about the tiles outside of its tile budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...layers.token_budget import TokenBudgetMixin, budget_argument_of
from ...layers.token_merging import check_nothing_merges


class S2TokenBudgetMixin(TokenBudgetMixin):
    """The part of `S2VisionConfig` that follows from its tiles."""

    def validate_wrapped(self) -> None:
        """A rule between fields, asked again wherever they are: the model inside may be told to merge later."""
        check_nothing_merges(self.vision_config, "a model at several scales")

    def max_num_tokens_for(
        self,
        image_size: int | Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
    ) -> int | None:
        """The most tokens of any image, whatever its shape. Arguments: `token_grid_for`."""
        if not self.dynamic or self.features_per_tile is None:
            return self.num_tokens_for(image_size, scales=scales, img_sizes=img_sizes)
        return self.max_tiles * self.features_per_tile[0] * self.features_per_tile[1]

    def budget_ladder(self, image_size: int | Sequence[int] | None = None) -> list[list]:
        """From the smallest scale in place of all of them to the configured ones: [1, 1], [1, 2]. Fewer tiles run.

        The configured ones alone with `dynamic`, whose last scale sets the tokens, and with `num_tiles`.
        """
        (configured,) = self.default_budgets()
        if self.dynamic or self.num_tiles is not None:
            return [configured]
        areas = [math.prod(size) for size in self.plan_for(self.tile_size).sizes]
        return [
            [
                part if area <= most else configured[areas.index(most)]
                for part, area in zip(configured, areas, strict=True)
            ]
            for most in sorted(set(areas))
        ]

    def hosted(self) -> tuple["S2TokenBudgetMixin", list[str]]:
        """A copy that shrinks images with antialias unless told otherwise, around a hosted copy of what it wraps."""
        hosted, notes = super().hosted()
        if hosted.antialias is None:
            hosted.antialias = True
        if isinstance(self.vision_config, TokenBudgetMixin):
            hosted.vision_config, notes = self.vision_config.hosted()
        return hosted, notes

    def image_processor_fields(self) -> dict[str, Any]:
        if not self.dynamic:
            return {}
        multiples = [round(multiple) for multiple in self.scale_multiples]
        return {"tile_size": self.tile_size[0], "tile_multiples": multiples, "max_tiles": self.max_tiles}

    def budget_code(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The size at each scale, and 0 for all tiles or 1 more than the tile budget."""
        sizes = [side for size in self.plan_for(image_size).sizes for side in size]
        return (*sizes, 0 if self.num_tiles is None else self.num_tiles + 1)

    def budget_from_code(self, code: Sequence[int], num_tokens: int) -> dict[str, Any]:
        *sides, tiles = code
        sizes = list(zip(sides[::2], sides[1::2], strict=True))
        if tiles == 0 and self.num_tiles is not None:
            plan = self.plan_for(self.tile_size, img_sizes=sizes)
            tiles = 1 + sum(plan.num_tiles(scale) for scale in plan.higher_scales)
        return {"img_sizes": sizes} | ({"num_tiles": tiles - 1} if tiles else {})

    def count_images(
        self, pixel_values: Sequence[torch.Tensor], image_sizes: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, tuple[int, ...]]]:
        """With `dynamic` the code is the size of the last scale. Arguments: `TokenBudgetMixin.count_images`."""
        if not self.dynamic:
            return super().count_images(pixel_values, image_sizes)
        per_tile = self.features_per_tile
        counts = []
        for height, width in ((int(side) for side in size) for size in image_sizes):
            rows, columns = height // self.tile_size[0] * per_tile[0], width // self.tile_size[1] * per_tile[1]
            counts.append((rows * columns, (height, width)))
        return counts

    def budget_calls(
        self, codes: Sequence[tuple[int, ...]], counts: Sequence[int]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """With `dynamic` all images go through the model together. Arguments: `TokenBudgetMixin.budget_calls`."""
        if not self.dynamic:
            return super().budget_calls(codes, counts)
        return [(list(range(len(codes))), {"image_sizes": torch.tensor([list(code) for code in codes])})]

    def coarse_budget(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments of the wrapped model for tiles outside of the budget; `None` where the first scale fills them.

        Args:
            options: the arguments of the call; a budget among them is what the cheaper one is cheaper than.
        """
        cheaper = getattr(self.vision_config, "cheaper_budget", None)
        if cheaper is None or self.tile_fill in ("first_scale", "map"):
            return None
        argument = budget_argument_of(self.vision_config)
        return cheaper(self.tile_size, **{name: options[name] for name in (argument,) if name in options})

    def coarse_grid(self, coarse: Mapping[str, Any]) -> tuple[int, int] | None:
        """(rows, columns) of a tile's tokens at that budget; `None` where they are no grid."""
        return self.vision_config.token_grid_for(self.tile_size, **coarse)


__all__ = ["S2TokenBudgetMixin"]
