"""What a wrapped model says about tiles, collected and put together over all scales."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..quadtree_vit.selection_quadtree_vit import reverse_quadtree
from .configuration_s2_vision import S2VisionConfig
from .multiscale_s2_vision import ScaleMerger, TilePlan, features_of


def _wanted(output_hidden_states: bool | int | Sequence[int] | None, count: int) -> set[int]:
    """The places in a tuple of `count` hidden states that are asked for."""
    if output_hidden_states is None or output_hidden_states is False:
        return set()
    if output_hidden_states is True:
        return set(range(count))
    layers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {layer % count for layer in layers if -count <= layer < count}


def _pooled(outputs, num_prefix_tokens: int) -> torch.Tensor:
    """One vector a tile: the model's own, else CLS, else the mean over its tokens."""
    if outputs.get("pooler_output") is not None:
        return outputs["pooler_output"].flatten(1)
    features = outputs["last_hidden_state"]
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features[:, 0] if num_prefix_tokens else features.mean(dim=1)


def _quadtree_as_grid(tokens: torch.Tensor, outputs, tile: tuple[int, int], config) -> torch.Tensor:
    """Tokens of a Quadtree ViT, of patches of several sizes, as the grid of its smallest patches."""
    prefix, patches = tokens[:, : config.num_prefix_tokens], tokens[:, config.num_prefix_tokens :]
    grid = reverse_quadtree(
        patches,
        outputs["patch_centers"],
        outputs["patch_sizes"],
        tile,
        config.min_patch_size,
        outputs.get("token_mask"),
    )
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


class TileOutputs:
    """Collects what the wrapped model says about tiles; `take` is called with the tiles, in the order of their
    plan.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: S2VisionConfig,
        output_hidden_states: bool | int | Sequence[int] | None,
        output_attentions: bool,
        options: dict,
    ):
        self.model = model
        self.config = config
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.options = options
        self.num_hidden_states = 0
        self.streams: dict[object, list[torch.Tensor]] = {}

    def take(self, tiles: torch.Tensor) -> None:
        outputs = self.model(
            tiles,
            output_hidden_states=self.output_hidden_states,
            output_attentions=self.output_attentions,
            return_dict=True,
            **self.options,
        )
        features = features_of(outputs, self.config.output_shape)
        is_quadtree = self.model.config.model_type == "quadtree_vit"
        tile = tuple(tiles.shape[-2:])

        def add(name: object, value: torch.Tensor) -> None:
            if is_quadtree and value.ndim == 3:
                value = _quadtree_as_grid(value, outputs, tile, self.model.config)
            self.streams.setdefault(name, []).append(value)

        add("last_hidden_state", features)
        add("pooler_output", _pooled(outputs, self.config.num_prefix_tokens))
        hidden_states = outputs.get("hidden_states") or ()
        self.num_hidden_states = len(hidden_states)
        for layer in _wanted(self.output_hidden_states, len(hidden_states)):
            if hidden_states[layer] is not None:
                add(("hidden_states", layer), hidden_states[layer])
        if self.output_attentions:
            for layer, attention in enumerate(outputs.get("attentions") or ()):
                self.streams.setdefault(("attentions", layer), []).append(attention)

    def merged(self, plan: TilePlan, batch: int, parts: dict[object, list[torch.Tensor]] | None = None) -> dict:
        """Each stream over all scales: a vector, or a map and its prefix tokens; attentions with the tiles of a
        picture together.
        """
        result = {}
        for name, tensors in (self.streams if parts is None else parts).items():
            if isinstance(name, tuple) and name[0] == "attentions":
                result[name] = torch.cat(tensors).unflatten(0, (-1, batch)).transpose(0, 1)
                continue
            merger = ScaleMerger(
                plan,
                batch,
                self.config.resize_output_to_idx,
                self.config.num_prefix_tokens if tensors[0].ndim == 3 else 0,
                self.config.features_per_tile,
            )
            for tensor in tensors:
                merger.add(tensor)
            result[name] = merger.result()
        return result

    def layers(self, values: dict, name: str, count: int) -> tuple | None:
        """The values of a stream that has one for each layer, None at layers without."""
        return tuple(values.get((name, layer)) for layer in range(count)) if count else None


__all__ = ["TileOutputs"]
