"""Tiles through the model that S2 wraps, and what it says about them, part by part."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...layers.token_merging import MERGING_WORD, check_nothing_merges
from .configuration_s2_vision import S2VisionConfig
from .multiscale_s2_vision import Part, drawn_budget, features_of, in_row_order, named_parts


def _wanted(layers: bool | list[int] | None, count: int) -> set[int]:
    """The places in a tuple of `count` hidden states that are asked for.

    Raises:
        ValueError: for a layer that there is not.
    """
    if not layers or not count:
        return set()
    if layers is True:
        return set(range(count))
    if not all(-count <= layer < count for layer in layers):
        raise ValueError(
            f"`output_hidden_states` must be True, False or indices from {-count} to {count - 1} of the {count} "
            f"hidden states of the wrapped model, got {layers}."
        )
    return {layer % count for layer in layers}


def _pooled(outputs: ModelOutput, num_prefix_tokens: int) -> torch.Tensor:
    """One vector per tile: the model's own, else CLS, else the mean over its tokens."""
    if outputs.get("pooler_output") is not None:
        return outputs["pooler_output"].flatten(1)
    features = outputs["last_hidden_state"]
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features[:, 0] if num_prefix_tokens else features.mean(dim=1)


class TileRunner:
    """The wrapped model with all that stays the same over the tiles of one call.

    Args:
        model: the wrapped model.
        config: of S2.
        output_hidden_states: the layers that are wanted, as `layers_wanted` gives them.
        output_attentions: whether attentions are wanted.
        options: other arguments of the wrapped model.
        pooled_only: leaves out what is not for the pooled vector, where the wrapped model can.

    Raises:
        ValueError: where the wrapped model merges tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: S2VisionConfig,
        output_hidden_states: bool | list[int] | None,
        output_attentions: bool,
        options: dict[str, Any],
        pooled_only: bool = False,
    ):
        self.model = model
        self.config = config
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.options = {**drawn_budget(model), **options}  # one draw per call, however many forwards it takes
        check_nothing_merges(model.config, "a model at several scales", options.get(MERGING_WORD))
        # The models of this library that take the argument have the field that turns it off.
        self.pooled_only = pooled_only and not getattr(model.config, "keep_all_tokens", True)
        if self.pooled_only:
            self.options["pooled_only"] = True

    @property
    def antialias(self) -> bool:
        """Whether images are shrunk to the lower scales with antialias."""
        return self.config.dynamic or bool(self.config.antialias)

    def chunk_for(self, batch: int) -> int | None:
        """How many tiles go through the wrapped model at a time; `None` for all."""
        if self.config.tiles_per_forward is None and self.config.split_forward:
            return batch
        return self.config.tiles_per_forward

    def run(self, tiles: torch.Tensor, **budget) -> dict[Part, torch.Tensor | None]:
        """What the wrapped model says about tiles (n, channels, height, width).

        Args:
            tiles: at least one.
            budget: arguments of the wrapped model in place of those of the call.
        """
        outputs = self.model(
            tiles,
            output_hidden_states=self.output_hidden_states,
            output_attentions=self.output_attentions,
            return_dict=True,
            **{**self.options, **budget},
        )
        tile = tuple(tiles.shape[-2:])
        tokens = None if self.pooled_only else features_of(outputs, self.config.output_shape)
        values = {
            "last_hidden_state": self._on_grid(tokens, outputs, tile),
            "pooler_output": _pooled(outputs, self.config.num_prefix_tokens),
        }
        states = outputs.get("hidden_states") or ()
        wanted = _wanted(self.output_hidden_states, len(states))
        if wanted:
            values["hidden_states"] = tuple(
                self._on_grid(state, outputs, tile, layer) if layer in wanted else None
                for layer, state in enumerate(states)
            )
        if self.output_attentions and outputs.get("attentions"):
            values["attentions"] = tuple(outputs["attentions"])
        return named_parts(values)

    def _on_grid(
        self, tensor: torch.Tensor | None, outputs: ModelOutput, tile: tuple[int, int], layer: int | None = None
    ) -> torch.Tensor | None:
        """`in_row_order` of what the wrapped model gave, if anything."""
        return None if tensor is None else in_row_order(self.model, tensor, outputs, tile, layer)

    def run_in_chunks(self, tiles: torch.Tensor, batch: int, **budget) -> dict[Part, torch.Tensor | None]:
        """`run` on any number of tiles, as many at a time as the config says for a batch of `batch` images."""
        chunks = [self.run(chunk, **budget) for chunk in tiles.split(self.chunk_for(batch) or len(tiles))]
        return {
            part: None if tensor is None else torch.cat([chunk[part] for chunk in chunks])
            for part, tensor in chunks[0].items()
        }


__all__ = ["TileRunner"]
