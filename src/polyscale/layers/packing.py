"""Images with token counts of their own in one batch: as one packed sequence, or padded to the longest.

In a padded batch every linear layer computes tokens that nothing reads. In a packed one the tokens of all images
follow one another, (1, tokens of all images, hidden): one forward of each layer, whatever the lengths, in which
attention alone has to know where an image ends.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import is_flash_attention_requested

from ..utils.tracing import is_traced
from .attention import attention_name
from .encoder_config import EncoderConfig
from .pooled_only import is_output_wanted


# The share of real tokens in a padded batch below which packing is the faster way: `benchmarks/packed.py`.
PACK_BELOW = 0.95


def packing_pays(lengths: Sequence[int], padded_length: int) -> bool:
    """Whether a batch is faster packed than padded: where less than `PACK_BELOW` of its tokens are real.

    Args:
        lengths (`Sequence[int]`): real tokens of each image, prefix tokens included.
        padded_length (`int`): tokens that each would be padded to.
    """
    return sum(lengths) < PACK_BELOW * len(lengths) * padded_length


class Padding(NamedTuple):
    """Which tokens of a batch are real; the real ones of an image come first.

    Attributes:
        mask (`torch.Tensor`): (batch, tokens), True at real tokens, prefix tokens included.
        lengths (`list[int]` or `None`): real tokens of each image; `None` where they are known to the device alone.
    """

    mask: torch.Tensor
    lengths: list[int] | None

    @classmethod
    def behind_prefix(
        cls, token_mask: torch.Tensor, num_prefix_tokens: int, counts: Sequence[int] | None
    ) -> "Padding":
        """Of a mask (batch, patch tokens) and the number of real patch tokens of each image."""
        lengths = None if counts is None else [num_prefix_tokens + count for count in counts]
        return cls(nn.functional.pad(token_mask, (num_prefix_tokens, 0), value=True), lengths)


class Packing(NamedTuple):
    """Where the tokens of a padded batch are in a packed sequence.

    Images of one length stand next to each other, so that attention takes them together.

    Attributes:
        places (`torch.Tensor`): (tokens of all images,), of each in the padded batch with its rows in a row.
        images (`torch.Tensor`): (tokens of all images,), which image of the batch each belongs to.
        bounds (`torch.Tensor`): (batch + 1,) int32, where each image of the sequence begins, and the end.
        order (`tuple[int, ...]`): the image of the batch that is the first of the sequence, the second, and so on.
        lengths (`tuple[int, ...]`): tokens of each image, in that order.
        padded_length (`int`): tokens that each is padded to.
        keeps_layout (`bool`): whether each layer takes and gives the padded layout, for a call that wants all hidden
            states.
    """

    places: torch.Tensor
    images: torch.Tensor
    bounds: torch.Tensor
    order: tuple[int, ...]
    lengths: tuple[int, ...]
    padded_length: int
    keeps_layout: bool

    @classmethod
    def of(
        cls,
        order: Sequence[int],
        lengths: Sequence[int],
        padded_length: int,
        device: torch.device,
        keeps_layout: bool = False,
    ) -> "Packing":
        """Of images in a given order and their lengths in that order."""
        counts, images = torch.tensor([lengths, order])
        bounds = nn.functional.pad(counts.cumsum(0), (1, 0))
        starts = (images * padded_length - bounds[:-1]).repeat_interleave(counts)
        places = torch.arange(len(starts)) + starts
        tensors = (places, images.repeat_interleave(counts), bounds.int())
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return cls(*moved, tuple(order), tuple(lengths), padded_length, keeps_layout)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, padded_length, ...) -> (1, tokens of all images, ...)"""
        return tokens.flatten(0, 1).index_select(0, self.places.to(tokens.device))[None]

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, tokens of all images, hidden) -> (batch, padded_length, hidden), 0 at padding."""
        batch = len(self.order)
        padded = tokens.new_zeros(batch * self.padded_length, tokens.shape[-1])
        return padded.index_copy_(0, self.places.to(tokens.device), tokens[0]).unflatten(
            0, (batch, self.padded_length)
        )

    def of_first(self, count: int) -> "Packing":
        """Of the first `count` tokens of each image."""
        return Packing.of(self.order, [count] * len(self.order), count, self.places.device, self.keeps_layout)

    def take_first(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """The first `count` tokens of each image: (1, tokens of all images, hidden) -> (1, batch * count, hidden)"""
        index = self.bounds[:-1, None] + torch.arange(count, device=self.bounds.device)
        return tokens.index_select(1, index.flatten().to(tokens.device))

    def groups(self) -> list[tuple[int, int]]:
        """(images, tokens of each) of the images of one length, in the order of the sequence."""
        sizes = {}
        for length in self.lengths:
            sizes[length] = sizes.get(length, 0) + 1
        return [(count, length) for length, count in sizes.items()]


def choose_packing(
    config: EncoderConfig, hidden_states: torch.Tensor, padding: Padding, outputs: dict[str, object]
) -> Packing | None:
    """How a padded batch is packed; `None` where it is run as it is.

    `config.pack_tokens` decides, and "auto" asks `packing_pays`. What is traced (`torch.compile`, `torch.export`)
    stays padded, for its shapes must not depend on lengths; so does a call that wants attentions, which have a padded
    layout, and flex attention, which would be compiled again for each length.

    Args:
        config (`EncoderConfig`): of the encoder.
        hidden_states (`torch.Tensor`): (batch, tokens, hidden).
        padding (`Padding`): of the batch.
        outputs (`dict`): keyword arguments of the call, `output_attentions` and `output_hidden_states` among them.
    """
    mode = config.pack_tokens
    if not mode or is_traced(hidden_states) or torch.jit.is_tracing() or attention_name(config) == "flex_attention":
        return None
    if is_output_wanted("output_attentions", config, outputs):
        return None
    lengths = padding.lengths
    if lengths is None:
        # A look at the mask waits for an accelerator: not unasked.
        if hidden_states.is_meta or (mode == "auto" and hidden_states.device.type != "cpu"):
            return None
        lengths = padding.mask.sum(dim=1).tolist()
    padded_length = hidden_states.shape[1]
    if mode == "auto" and not packing_pays(lengths, padded_length):
        return None
    order = sorted(range(len(lengths)), key=lambda image: lengths[image])
    return Packing.of(
        order,
        [lengths[image] for image in order],
        padded_length,
        hidden_states.device,
        keeps_layout=is_output_wanted("output_hidden_states", config, outputs),
    )


def padding_mask(
    config: EncoderConfig, hidden_states: torch.Tensor, padding: Padding, num_queries: int | None = None
) -> torch.Tensor | None:
    """The mask of a padded batch as the attention implementation takes it.

    Args:
        config (`EncoderConfig`): of the encoder.
        hidden_states (`torch.Tensor`): (batch, tokens, hidden).
        padding (`Padding`): of the batch.
        num_queries (`int`, *optional*): how many of the first tokens are queries; all when `None`.
    """
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states[:, :num_queries],
        attention_mask=padding.mask,
        encoder_hidden_states=hidden_states,
    )


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    num_queries: int | None,
    key_bias: torch.Tensor | None,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    **kwargs,
) -> torch.Tensor:
    """Attention of each image of a packed sequence to itself: (1, queries of all images, heads, head width).

    Flash attention takes the whole sequence and the bounds of its images; for the others there is one call for all
    images of one length.

    Args:
        module (`nn.Module`): the attention layer, with its `config` and `scaling`.
        query (`torch.Tensor`): (1, heads, queries of all images, head width).
        key, value (`torch.Tensor`): (1, heads, tokens of all images, head width).
        packing (`Packing`): of the sequence.
        num_queries (`int`, *optional*): of each image; as many as it has tokens when `None`.
        key_bias (`torch.Tensor`, *optional*): (1, tokens of all images), added to the logits of each key.
        attend (`Callable`): of query, key, value, mask and bias, (images, ...) each; gives the output and the weights.
        kwargs: for `attend`.
    """
    if is_flash_attention_requested(module.config):
        queries = packing if num_queries is None else packing.of_first(num_queries)
        varlen = {
            "cu_seq_lens_q": queries.bounds,
            "cu_seq_lens_k": packing.bounds,
            "max_length_q": max(queries.lengths),
            "max_length_k": max(packing.lengths),
        }
        return attend(query, key, value, None, key_bias, **{**kwargs, **varlen})[0]
    outputs, first_query, first_key = [], 0, 0
    for images, length in packing.groups():
        queries_of_each = length if num_queries is None else num_queries
        last_query, last_key = first_query + images * queries_of_each, first_key + images * length

        def part(tokens: torch.Tensor, first: int, last: int, images: int = images) -> torch.Tensor:
            """(1, heads, tokens, head width) -> (images, heads, tokens of each, head width), without a copy."""
            return tokens[0, :, first:last].unflatten(1, (images, -1)).transpose(0, 1)

        bias = None if key_bias is None else key_bias[0, first_key:last_key].view(images, length)
        output, _ = attend(
            part(query, first_query, last_query),
            part(key, first_key, last_key),
            part(value, first_key, last_key),
            None,
            bias,
            **kwargs,
        )  # (images, queries, heads, head width)
        outputs.append(output.flatten(0, 1))
        first_query, first_key = last_query, last_key
    return torch.cat(outputs)[None]


__all__ = [
    "PACK_BELOW",
    "Packing",
    "Padding",
    "choose_packing",
    "packed_attention",
    "packing_pays",
    "padding_mask",
]
