"""When Do We Not Need Larger Vision Models? (S2, arXiv 2403.13043): any vision model at several scales.

From what a model says about tiles to features of the image, and the function of the official package.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...layers.token_merging import check_nothing_merges
from ...utils.validation import check_choice, check_int, shown
from ...utils.vision_configs import check_tokens_have_places
from .tiling_s2_vision import (
    TilePlan,
    area_resize,
    check_chunks,
    check_scale_index,
    join_tiles,
    plan_tiles,
    run_tiles,
    token_grid,
)


OUTPUT_SHAPES = ("bnc", "bchw")

# A part of a model's output: its name, and its place where there is one for each layer.
Part = tuple[str, int | None]


def named_parts(values: Mapping[str, torch.Tensor | tuple]) -> dict[Part, torch.Tensor | None]:
    """Each tensor of a model's output under a key of its own: name -> (name, `None`), its n-th layer -> (name, n)."""
    parts = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            parts |= {(name, layer): tensor for layer, tensor in enumerate(value)}
        else:
            parts[name, None] = value
    return parts


def tokens_as_map(tokens: torch.Tensor, tile: tuple[int, int], grid: tuple[int, int] | None) -> torch.Tensor:
    """Tokens (n, rows * columns, width) of tiles -> maps (n, width, rows, columns).

    Args:
        tokens: without prefix tokens.
        tile: (height, width) of a tile in pixels.
        grid: (rows, columns) that is expected; found from the number of tokens where it is `None` or another one.
    """
    if grid is None or grid[0] * grid[1] != tokens.shape[1]:
        grid = token_grid(tokens.shape[1], tile)
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_as_tokens(features: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """(batch, width, rows, columns) and (batch, prefix, width) -> (batch, prefix + rows * columns, width)"""
    return torch.cat([prefix, features.flatten(2).transpose(1, 2)], dim=1)


class TileFeatures:
    """What a model says about tiles, put together again: one tensor over all scales for each part of its output.

    Args:
        plan: the tiles.
        batch: number of images.
        resize_output_to_idx: the scale whose feature grid the output has.
        num_prefix_tokens: tokens in front of each tile's that have no place; averaged over the tiles of a scale.
        features_per_tile: (rows, columns) of a tile's features; found from their number where it is `None`, or where
            they are others.
    """

    def __init__(
        self,
        plan: TilePlan,
        batch: int,
        resize_output_to_idx: int = 0,
        num_prefix_tokens: int = 0,
        features_per_tile: tuple[int, int] | None = None,
    ):
        self.plan = plan
        self.batch = batch
        self.target = resize_output_to_idx % len(plan.sizes)
        self.num_prefix_tokens = num_prefix_tokens
        self.features_per_tile = features_per_tile
        self._waiting: dict[Part, list[torch.Tensor]] = {}
        self._scales: dict[Part, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def add(self, parts: Mapping[Part, torch.Tensor | None]) -> None:
        """What the model says about the next tiles, in the order of the plan.

        Args:
            parts: tokens (n, tokens, width), maps (n, width, rows, columns) or vectors (n, width); `None` for a layer
                that was not asked for. "attentions" are of any shape and stay one for each tile.
        """
        for part, tensor in parts.items():
            waiting = self._waiting.setdefault(part, [])
            if tensor is not None:
                waiting.append(tensor)
            if waiting and part[0] != "attentions":
                self._merge_full_scales(part)

    def _merge_full_scales(self, part: Part) -> None:
        scales = self._scales.setdefault(part, [])
        while len(scales) < len(self.plan.sizes):
            needed = self.plan.num_tiles(len(scales)) * self.batch
            waiting = self._waiting[part]
            if sum(tensor.shape[0] for tensor in waiting) < needed:
                return
            joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            self._waiting[part] = [joined[needed:]]
            scales.append(self._merged_scale(joined[:needed], len(scales)))

    def _merged_scale(self, features: torch.Tensor, scale: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One vector or map per image, and the mean prefix tokens if `features` are tokens."""
        if features.ndim == 2:
            return self._tile_mean(features), None
        prefix = None
        if features.ndim == 3:
            prefix = self._tile_mean(features[:, : self.num_prefix_tokens])
            features = tokens_as_map(features[:, self.num_prefix_tokens :], self.plan.tile, self.features_per_tile)
        per_tile = tuple(features.shape[-2:])
        features = join_tiles(features, self.plan.tile_grid(scale))
        if self.plan.uneven == "pad":
            rows, columns = self.plan.feature_grid(scale, per_tile)
            features = features[:, :, :rows, :columns]
        return area_resize(features, self.plan.feature_grid(self.target, per_tile)), prefix

    def _tile_mean(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (-1, self.batch)).mean(dim=0)

    def merged(self, name: str) -> torch.Tensor | tuple | None:
        """A part over all scales: tokens (batch, prefix + tokens, scales * width), a map (batch, scales * width, rows,
        columns) or a vector (batch, scales * width); a tuple of them where there is one for each layer; `None` where
        the model said nothing. Attentions are (batch, tiles, ...).
        """
        if (name, None) in self._waiting:
            return self._merged_part((name, None))
        layers = [part for part in self._waiting if part[0] == name]
        return tuple(self._merged_part(part) for part in layers) or None

    def _merged_part(self, part: Part) -> torch.Tensor | None:
        if part[0] == "attentions":
            return torch.cat(self._waiting[part]).unflatten(0, (-1, self.batch)).transpose(0, 1)
        if part not in self._scales:
            return None
        features, prefixes = zip(*self._scales[part], strict=True)
        joined = torch.cat(features, dim=1)
        return joined if prefixes[0] is None else map_as_tokens(joined, torch.cat(prefixes, dim=-1))


def features_of(output: object, output_shape: str) -> torch.Tensor:
    """The features in what a model returned: a tensor, a tuple that begins with it, or an output object of
    transformers.

    Raises:
        ValueError: for a classifier's logits, or features of another shape than `output_shape` says.
    """
    if not isinstance(output, torch.Tensor):
        named = output if isinstance(output, dict) else {}
        if "last_hidden_state" in named:
            output = named["last_hidden_state"]
        elif "feature_maps" in named:
            output = named["feature_maps"][-1]
        elif "logits" in named:
            raise ValueError(
                "`model` gives a classifier's logits where features are expected: pass the model without its head, "
                "or a function that returns the features (`lambda x: model(x, "
                "output_hidden_states=True).hidden_states[-1]`)."
            )
        elif isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
            output = output[0]
        else:
            raise ValueError(
                "`model` must return features: a tensor, or an output with `last_hidden_state`, got "
                f"{type(output).__name__}."
            )
    expected = {"bnc": 3, "bchw": 4}[output_shape]
    if output.ndim == 2:
        raise ValueError(
            f"`model` gives a classifier's logits, or another single vector per image, of shape {tuple(output.shape)} "
            "where features are expected: (batch, tokens, width) or (batch, width, rows, columns). Pass the model "
            "without its head."
        )
    if output.ndim != expected:
        fitting = {3: "bnc", 4: "bchw"}.get(output.ndim)
        hint = f" Use `output_shape={fitting!r}`." if fitting else ""
        raise ValueError(
            f"`output_shape={output_shape!r}` expects features with {expected} dimensions, the model gives "
            f"{tuple(output.shape)}.{hint}"
        )
    return output


def in_row_order(
    model: Callable, tokens: torch.Tensor, outputs: object, tile: tuple[int, int], layer: int | None = None
) -> torch.Tensor:
    """Tokens (n, tokens, channels) of a model in row order, where it can tell where each is from; others as they are.

    `layer` counts as in `hidden_states`; the last when None.
    """
    to_grid = getattr(model, "tokens_to_grid", None)
    return tokens if tokens.ndim != 3 or to_grid is None else to_grid(tokens, outputs, tile, layer)


def drawn_budget(model: Callable) -> dict:
    """A budget for all forwards of a call, where the model draws one in training."""
    draw_budget = getattr(model, "draw_budget", None)
    return {} if draw_budget is None else draw_budget()


def _features_function(model: Callable, output_shape: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Tiles -> features in row order. A model that has a config is asked where its tokens are from; of a bare function
    nothing is known.

    Raises:
        ValueError: for a model that merges tokens, or whose tokens have no place.
    """
    if isinstance(model, PreTrainedModel):
        check_nothing_merges(model.config, "`multiscale_forward`")
        check_tokens_have_places(model.config, "`model`")
    options = {**drawn_budget(model), **({"return_dict": True} if hasattr(model, "tokens_to_grid") else {})}

    def run(tiles: torch.Tensor) -> torch.Tensor:
        outputs = model(tiles, **options)
        return in_row_order(model, features_of(outputs, output_shape), outputs, tuple(tiles.shape[-2:]))

    return run


def multiscale_forward(
    model: Callable,
    input: torch.Tensor,
    scales: Sequence[float] | None = None,
    img_sizes: Sequence[int | Sequence[int]] | None = None,
    max_split_size: int | Sequence[int] | None = None,
    resize_output_to_idx: int = 0,
    num_prefix_token: int = 0,
    output_shape: str = "bnc",
    split_forward: bool = False,
    *,
    uneven: str = "resize",
    tiles_per_forward: int | None = None,
) -> torch.Tensor:
    """Features of an image at several scales, concatenated on channels: the token count is that of one scale.

    Each scale is the input resized (bicubic, not antialiased), cut into tiles of `max_split_size`, and given to the
    model; the tiles' features are joined to one map per scale, and all maps resized ("area") to one grid. The
    arguments are those of `s2wrapper.forward`.

    Args:
        model (`Callable`): a function or model from images (n, channels, height, width) to features: (n, tokens,
            width) or (n, width, rows, columns), an output object with `last_hidden_state`, or a tuple that begins with
            one of these. Give a Quadtree ViT itself, not a function that calls it: then its tokens are laid out as the
            patches lie.
        input (`torch.Tensor` of shape `(batch, channels, height, width)`): images of any height and width.
        scales (`Sequence[float]`, *optional*): the scales, as factors of the input's height and width.
        img_sizes (`Sequence`, *optional*): in place of `scales`, the size in pixels at each scale: int (a square) or
            (height, width).
        max_split_size (`int` or `(height, width)`, *optional*): size in pixels of the tiles; the input's size when
            `None`.
        resize_output_to_idx (`int`, *optional*, defaults to 0): the scale (its place in the list) whose feature grid
            the output has.
        num_prefix_token (`int`, *optional*, defaults to 0): tokens in front of the model's output that have no place
            in the image (CLS, registers). They are averaged over the tiles of a scale.
        output_shape (`str`, *optional*, defaults to `"bnc"`): `"bnc"` (tokens: a ViT) or `"bchw"` (maps: a ConvNet);
            the model's output and this function's.
        split_forward (`bool`, *optional*, defaults to `False`): whether the tiles go through the model one place at a
            time (`batch` tiles): the memory of about one scale.
        uneven (`str`, *optional*, defaults to `"resize"`): how a size that is no multiple of `max_split_size` is cut,
            so that the model still sees tiles of that size: `"resize"` enlarges the scaled image to whole tiles,
            `"pad"` adds zeros at its bottom and right. The feature grid is that of the scaled image in both cases.
        tiles_per_forward (`int`, *optional*): how many tiles go through the model at a time; all when `None`.

    Returns:
        (batch, num_prefix_token + tokens, scales * width), or (batch, scales * width, rows, columns).

    Raises:
        ValueError: for both or neither of `scales` and `img_sizes`, a scale that leaves an empty tile, a wrong
            choice or index, an input of another shape or without floating-point numbers, logits in place of
            features, token counts that are no grid, and a model that merges tokens or whose tokens have no place
            in the image (SparseFormer).

    Example:

    ```python
    >>> features = multiscale_forward(model, images, scales=[1, 2], num_prefix_token=1)
    ```
    """
    if not callable(model):
        raise ValueError(f"`model` must be a model or a function from images to features, got {shown(model)}.")
    check_choice("output_shape", output_shape, OUTPUT_SHAPES)
    check_int("num_prefix_token", num_prefix_token)
    check_choice("split_forward", split_forward, (True, False))
    is_tensor = isinstance(input, torch.Tensor)
    if not is_tensor or input.ndim != 4 or 0 in input.shape or not input.is_floating_point():
        got = f"{tuple(input.shape)} of {input.dtype}" if is_tensor else f"a {type(input).__name__}"
        raise ValueError(
            "`input` must be floating-point images of shape (batch, channels, height, width), at least one, got "
            f"{got}."
        )
    if num_prefix_token < 0 or (output_shape == "bchw" and num_prefix_token):
        raise ValueError(
            f"`num_prefix_token` must be at least 0, and 0 with `output_shape='bchw'`, got {num_prefix_token}."
        )
    check_chunks(tiles_per_forward)
    plan = plan_tiles(input.shape[-2:], scales, img_sizes, max_split_size, uneven)
    check_scale_index(resize_output_to_idx, len(plan.sizes))
    if split_forward and tiles_per_forward is None:
        tiles_per_forward = input.shape[0]

    features = TileFeatures(plan, input.shape[0], resize_output_to_idx, num_prefix_token)
    features_of_tiles = _features_function(model, output_shape)

    def run(tiles: torch.Tensor) -> None:
        made = features_of_tiles(tiles)
        if made.shape[0] != tiles.shape[0]:
            raise ValueError(f"`model` gives features of {made.shape[0]} images for {tiles.shape[0]} tiles.")
        if num_prefix_token >= made.shape[1]:
            raise ValueError(
                f"`num_prefix_token` must be below the {made.shape[1]} tokens that the model gives for a tile, got "
                f"{num_prefix_token}."
            )
        features.add(named_parts({"features": made}))

    run_tiles(input, plan, run, tiles_per_forward)
    return features.merged("features")


__all__ = [
    "OUTPUT_SHAPES",
    "Part",
    "TileFeatures",
    "drawn_budget",
    "features_of",
    "in_row_order",
    "map_as_tokens",
    "multiscale_forward",
    "named_parts",
    "tokens_as_map",
]
