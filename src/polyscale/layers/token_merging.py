"""Token merging: Your ViT But Faster (ToMe, arXiv 2210.09461), written from the paper.

Between the layers of a ViT the most similar tokens are merged into one, so that the number of tokens falls from layer
to layer to an exact budget. A merged token knows its size, the number of patches it stands for: attention counts it as
often ("proportional attention"), and so does a mean over the tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from ..utils.validation import check_int
from .attention import attention_name


MERGING_WORD = "merge_tokens_to"  # the argument of `forward`, and the config field, of models that can merge
MERGING_ATTENTION = "token_merging_"  # what the names of the attention functions of `apply_token_merging` begin with


class MergedTokens(NamedTuple):
    """Tokens after a merge.

    Attributes:
        hidden_states (`torch.Tensor`): (batch, tokens, hidden), prefix tokens first.
        sizes (`torch.Tensor`): (batch, tokens), how many patches each stands for; 1 for prefix tokens. With further
            kinds of sizes (batch, tokens, kinds), as they were given.
    """

    hidden_states: torch.Tensor
    sizes: torch.Tensor


def merges_by_attention(config: PreTrainedConfig) -> bool:
    """Whether `apply_token_merging` has the model with this config merge tokens, of which its fields say nothing."""
    return (attention_name(config) or "").startswith(MERGING_ATTENTION)


def check_nothing_merges(config: PreTrainedConfig, where: str, merge_tokens_to: int | None = None) -> None:
    """Refuses a model that merges tokens, where tokens are laid out as a map: merged ones have no place in it.

    Args:
        config (`PreTrainedConfig`): of any model.
        where (`str`): what lays them out, for the error.
        merge_tokens_to (`int`, *optional*): what a call asks for; as the config says when `None`.

    Raises:
        ValueError: where the call, the config or `apply_token_merging` has tokens merged.
    """
    number = getattr(config, MERGING_WORD, None) if merge_tokens_to is None else merge_tokens_to
    if number is not None:
        raise ValueError(
            f"`{MERGING_WORD}` must be None in {where}, got {number}: merged tokens have no place in a feature map."
        )
    if merges_by_attention(config):
        raise ValueError(
            f"The model in {where} merges tokens (`apply_token_merging`), which then have no place in a feature map: "
            "`remove_token_merging` makes it the plain model again."
        )


def merge_schedule(num_tokens: int, merge_tokens_to: int, num_layers: int) -> list[int]:
    """How many tokens each layer merges away so that exactly `merge_tokens_to` are left after the last.

    The same number in each layer, as in the paper, the first layers taking one more where it does not divide; a layer
    can merge at most half of its tokens, and what it cannot is left to those after it.

    Args:
        num_tokens (`int`): patch tokens in front of the first layer.
        merge_tokens_to (`int`): patch tokens after the last; `num_tokens` or more merges nothing.
        num_layers (`int`): layers that merge.

    Raises:
        ValueError: for a budget that so few layers cannot reach; it names the smallest that they can.
    """
    merge_tokens_to = check_int(MERGING_WORD, merge_tokens_to, minimum=1)
    surplus = max(num_tokens - merge_tokens_to, 0)
    for most in range(num_tokens // 2 + 1):
        schedule = _merged_at_most(most, num_tokens, num_layers)
        excess = sum(schedule) - surplus
        if excess >= 0:
            merging = [place for place in range(num_layers) if schedule[place]]
            for place in merging[len(merging) - excess :]:
                schedule[place] -= 1
            return schedule
    raise ValueError(
        f"`merge_tokens_to` must be at least {num_tokens - sum(schedule)} for {num_tokens} tokens and {num_layers} "
        f"layers, each of which can merge at most half of its tokens; got {merge_tokens_to}."
    )


def _merged_at_most(most: int, num_tokens: int, num_layers: int) -> list[int]:
    schedule = []
    for _ in range(num_layers):
        schedule.append(min(most, num_tokens // 2))
        num_tokens -= schedule[-1]
    return schedule


def merge_tokens(
    hidden_states: torch.Tensor,
    metric: torch.Tensor,
    num_merged: int,
    sizes: torch.Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> MergedTokens:
    """Merges the `num_merged` most similar pairs of tokens: bipartite soft matching.

    The patch tokens are dealt out to two sets in turn. Each token of the first set finds the most similar one of the
    second by the cosine of `metric`; the `num_merged` closest pairs become one token each, the mean of its members
    weighted by their sizes. Prefix tokens are left alone. The order afterwards: prefix tokens, what is left of the
    first set, the second set.

    Args:
        hidden_states (`torch.Tensor`): (batch, tokens, hidden), prefix tokens first.
        metric (`torch.Tensor`): (batch, tokens, width), what similarity is measured on; the paper takes the keys of
            attention, averaged over the heads.
        num_merged (`int`): tokens that go, at most half of the patch tokens.
        sizes (`torch.Tensor`, *optional*): (batch, tokens), or (batch, tokens, kinds), of which the first kind weighs
            the members and the others are summed with it; all 1 when `None`.
        num_prefix_tokens (`int`, *optional*, defaults to 0): tokens in front that are no patches.
    """
    if sizes is None:
        sizes = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.float32)
    if num_merged == 0:
        return MergedTokens(hidden_states, sizes)
    kinds = sizes if sizes.ndim == 3 else sizes[..., None]
    metric = F.normalize(metric[:, num_prefix_tokens:].float(), dim=-1)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=2)  # (batch, first set)
    order = best.argsort(dim=1, descending=True, stable=True)
    gone, kept = order[:, :num_merged], order[:, num_merged:].sort(dim=1).values
    target = partner.gather(1, gone)  # (batch, num_merged), places in the second set

    prefix, patches = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
    prefix_kinds, patch_kinds = kinds[:, :num_prefix_tokens], kinds[:, num_prefix_tokens:]
    first, second = patches[:, ::2], patches[:, 1::2]
    first_kinds, second_kinds = patch_kinds[:, ::2], patch_kinds[:, 1::2]
    given_kinds = _take(first_kinds, gone)
    # Sizes are float32, and so are their products: a sum over many patches is more than float16 holds.
    given = _take(first, gone) * given_kinds[..., :1]
    summed = (second * second_kinds[..., :1]).scatter_add(1, _spread(target, given), given)
    new_kinds = second_kinds.scatter_add(1, _spread(target, given_kinds), given_kinds)
    mean = (summed / new_kinds[..., :1]).to(hidden_states.dtype)
    merged_kinds = torch.cat([prefix_kinds, _take(first_kinds, kept), new_kinds], dim=1)
    return MergedTokens(
        torch.cat([prefix, _take(first, kept), mean], dim=1),
        merged_kinds if sizes.ndim == 3 else merged_kinds[..., 0],
    )


def _spread(index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """An index (batch, count) of tokens, for all of their channels."""
    return index[..., None].expand(-1, -1, tokens.shape[-1])


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, _spread(index, tokens))


class MergeStep(NamedTuple):
    """What one layer has to know to merge tokens.

    Attributes:
        num_merged (`int`): tokens that it merges away.
        sizes (`torch.Tensor` or `None`): before it, as `merge_tokens` takes them.
        num_prefix_tokens (`int`): tokens in front that are no patches.
    """

    num_merged: int
    sizes: torch.Tensor | None
    num_prefix_tokens: int


def size_bias(sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask of proportional attention, log(size) of each key: (batch, tokens) -> (batch, 1, 1, tokens)."""
    return sizes.log().to(dtype)[:, None, None, :]


__all__ = [
    "MERGING_ATTENTION",
    "MERGING_WORD",
    "MergeStep",
    "MergedTokens",
    "check_nothing_merges",
    "merge_schedule",
    "merge_tokens",
    "merges_by_attention",
    "size_bias",
]
