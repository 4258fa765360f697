"""The fill "map" of a tile budget: linear maps from the features of the first scale to those of the tiles that do not
run, fitted on images without labels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...utils.validation import check_int, check_number, check_pixel_values
from ...utils.vision_configs import base_pooled_width, base_stage_widths, base_width
from .configuration_s2_vision import S2VisionConfig
from .multiscale_s2_vision import Part
from .running_s2_vision import TileRunner
from .tile_budget_s2_vision import first_scale_as_tiles
from .tiling_s2_vision import TilePlan, cut_tiles, whole_scale


Parts = Mapping[Part, torch.Tensor | None]
_TOKENS, _POOLED, _STATES = "last_hidden_state", "pooler_output", "hidden_states"


class TileMap(nn.Module):
    """One linear layer for each higher scale and each part of a model's output: its tokens, its prefix tokens, its
    pooled vector, and those of the layers in `config.tile_map_layers`.
    """

    def __init__(self, config: S2VisionConfig):
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens
        inner = config.vision_config
        states = base_stage_widths(inner)
        widths = {_TOKENS: base_width(inner), _POOLED: base_pooled_width(inner)}
        widths |= {f"{_STATES}_{layer}": states[layer] for layer in config.tile_map_layers}
        if self.num_prefix_tokens:
            widths |= {f"{name}_prefix": width for name, width in widths.items() if name != _POOLED}
        num_higher = config.num_scales - 1
        self.maps = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(width, width) for _ in range(num_higher)])
                for name, width in widths.items()
            }
        )

    def flat_parts(self, parts: Parts, plan: TilePlan) -> Iterator[tuple[str, Part, list[torch.Tensor]]]:
        """(name of the map, part, features of the tiles of each higher scale), features (tiles * batch, ..., width).

        Prefix tokens come apart from the others. Layers without a map are left out.
        """
        numbers = [plan.num_tiles(scale) for scale in plan.higher_scales]
        for part, tensor in parts.items():
            name = part[0] if part[1] is None else f"{part[0]}_{part[1]}"
            if tensor is None or name not in self.maps:
                continue
            batch = tensor.shape[0] // sum(numbers)
            if tensor.ndim == 4:  # a ConvNet's maps
                tensor = tensor.permute(0, 2, 3, 1)
            split = [number * batch for number in numbers]
            if tensor.ndim == 3 and self.num_prefix_tokens:
                yield f"{name}_prefix", part, list(tensor[:, : self.num_prefix_tokens].split(split))
                tensor = tensor[:, self.num_prefix_tokens :]
            yield name, part, list(tensor.split(split))

    def forward(self, parts: Parts, plan: TilePlan) -> dict[Part, torch.Tensor | None]:
        """What the first scale says about the tiles of the higher scales -> what the tiles would say themselves.

        Raises:
            ValueError: for a layer that no map was fitted for.
        """
        for part, tensor in parts.items():
            if tensor is not None and part[0] == _STATES and f"{_STATES}_{part[1]}" not in self.maps:
                raise ValueError(
                    f"`tile_fill='map'` has no map for the hidden states of layer {part[1]}: name it in `layers` of "
                    "`fit_tile_map`."
                )
        filled: dict[Part, torch.Tensor | None] = dict.fromkeys(parts)
        for name, part, scales in self.flat_parts(parts, plan):
            mapped = torch.cat([layer(features) for layer, features in zip(self.maps[name], scales, strict=True)])
            if parts[part].ndim == 4:
                mapped = mapped.permute(0, 3, 1, 2)
            before = filled[part]  # the prefix tokens
            filled[part] = mapped if before is None else torch.cat([before, mapped], dim=1)
        return filled


class _Equations:
    """The normal equations of one linear layer, in double precision; data come in pieces and are not kept."""

    def __init__(self, width: int):
        self.count = 0
        self.sums = torch.zeros(2, width, dtype=torch.float64)
        self.products = torch.zeros(2, width, width, dtype=torch.float64)  # inputs by inputs, inputs by targets

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """(..., width) each."""
        x, y = (values.flatten(0, -2).cpu().double() for values in (inputs, targets))
        self.count += len(x)
        self.sums += torch.stack([x.sum(dim=0), y.sum(dim=0)])
        self.products += torch.stack([x.T @ x, x.T @ y])

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (width, width) and bias (width,) of the layer with the least squares."""
        mean_x, mean_y = self.sums / self.count
        gram = self.products[0] / self.count - mean_x[:, None] * mean_x
        cross = self.products[1] / self.count - mean_x[:, None] * mean_y
        penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), cross).T
        return weight, mean_y - weight @ mean_x


def make_tile_map(config: S2VisionConfig) -> TileMap | None:
    """The maps of a config whose maps were fitted; `None` for others."""
    is_fitted = config.tile_fill == "map" and config.tile_map_layers is not None
    return TileMap(config) if is_fitted else None


@torch.no_grad()
def fit_tile_map(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    *,
    layers: int | Sequence[int] = (),
    ridge: float = 1e-3,
    batch_size: int = 8,
) -> None:
    """Fits the maps of `tile_fill="map"` on images without labels and puts them, and the fill, into an S2 model.

    All tiles of the images run once; a linear map from the features of the first scale to those of each tile's place
    is fitted by least squares, from sums that are kept while images pass. The maps are saved with the model.

    Args:
        model (`S2VisionWrapper`, or one with a head): changed in place.
        images (`torch.Tensor` or `Iterable[torch.Tensor]`): normalised pixels (images, channels, height, width), at
            the largest scale's size; or batches of them, which are read once.
        layers (`int` or `Sequence[int]`, *optional*, defaults to none): hidden states that are filled too, as in
            `output_hidden_states`; a LLaVA model reads layer -2.
        ridge (`float`, *optional*, defaults to 1e-3): penalty on the weights, relative to the mean variance of the
            features.
        batch_size (`int`, *optional*, defaults to 8): images at a time, where `images` is one tensor.

    Raises:
        ValueError: for another model, `dynamic=True`, no images or something else, a negative `ridge`, or a layer that
            the model does not have.
    """
    wrapper = getattr(model, "base_model", model)
    config = getattr(wrapper, "config", None)
    if not isinstance(config, S2VisionConfig):
        raise ValueError(f"`model` must be an S2VisionWrapper or have one inside, got {type(model).__name__}.")
    if config.dynamic:
        raise ValueError("`model` has `dynamic=True`, where no tile is left out.")
    check_number("ridge", ridge)
    if not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be finite and at least 0, got {ridge!r}.")
    check_int("batch_size", batch_size, minimum=1)
    if not isinstance(images, Iterable) or isinstance(images, str | Mapping):
        raise ValueError(f"`images` must be a tensor, or batches of them, got a {type(images).__name__}.")
    if isinstance(layers, str) or not isinstance(layers, int | Sequence):
        raise ValueError(f"`layers` must be an int or a list of ints, got {layers!r}.")
    count = config.num_hidden_layers + 1
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if any(not -count <= check_int("layers", layer) < count for layer in wanted):
        raise ValueError(f"`layers` must be between {-count} and {count - 1}, got {layers!r}.")
    wanted = sorted({layer % count for layer in wanted})

    fields = {"tile_fill": config.tile_fill, "tile_map_layers": config.tile_map_layers}
    was_training = wrapper.training
    wrapper.eval()
    try:
        config.tile_fill, config.tile_map_layers = "map", wanted
        tile_map = TileMap(config)
        equations = {
            name: [_Equations(layer.in_features) for layer in scales] for name, scales in tile_map.maps.items()
        }
        runner = TileRunner(wrapper.vision_model, config, wanted or None, False, {})
        batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
        for batch in batches:
            check_pixel_values(batch, config.num_channels)
            if not torch.isfinite(batch).all():
                raise ValueError("`images` holds NaN or infinite values.")
            inputs, targets, plan = _pairs(runner, batch.to(wrapper.device, wrapper.dtype))
            for (name, _, xs), (_, _, ys) in zip(
                tile_map.flat_parts(inputs, plan), tile_map.flat_parts(targets, plan), strict=True
            ):
                for own, x, y in zip(equations[name], xs, ys, strict=True):
                    own.add(x, y)
        for name, scales in tile_map.maps.items():
            for layer, own in zip(scales, equations[name], strict=True):
                if own.count == 0:
                    raise ValueError("`images` holds no image.")
                weight, bias = own.solve(ridge)
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
    except BaseException:
        config.tile_fill, config.tile_map_layers = fields["tile_fill"], fields["tile_map_layers"]
        raise
    finally:
        wrapper.train(was_training)
    wrapper.tile_map = tile_map.to(wrapper.device, wrapper.dtype)


def _pairs(runner: TileRunner, pixel_values: torch.Tensor) -> tuple[Parts, Parts, TilePlan]:
    """What the first scale says about the tiles of the higher scales, and what they say themselves."""
    config, batch = runner.config, pixel_values.shape[0]
    plan = config.plan_for(tuple(pixel_values.shape[-2:]))
    tiles = [
        cut_tiles(whole_scale(pixel_values, plan, scale, runner.antialias), plan.tile_grid(scale))
        for scale in (plan.first_scale, *plan.higher_scales)
    ]
    first = runner.run_in_chunks(tiles[0], batch)
    inputs = first_scale_as_tiles(first, plan, config.num_prefix_tokens, config.features_per_tile)
    return inputs, runner.run_in_chunks(torch.cat(tiles[1:]), batch), plan


__all__ = ["TileMap", "fit_tile_map", "make_tile_map"]
