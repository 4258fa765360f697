"""Batches drawn by their number of tokens, for images with token counts of their own."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

from ..utils.validation import check_int


class TokenBatchSampler(Sampler[list[int]]):
    """Draws batches of about the same number of tokens, whatever the number of images.

    It is the `batch_sampler` of a `DataLoader`. Every example is in one batch of an epoch: each in turn goes to the
    batch that has the fewest tokens so far. The number of batches is the same in every epoch and on every process;
    where there are fewer examples than processes, some are repeated. So that none has more than `max_tokens`, a batch
    has on average at most `max_tokens` less those of the longest example: leave room for several of them.

    Args:
        lengths (`Sequence[int]`): tokens of each example, prefix tokens included where they are to count.
        max_tokens (`int`): the most tokens in a batch; at least those of the longest example.
        shuffle (`bool`, *optional*, defaults to `True`): whether examples are drawn in a new order in every epoch.
        seed (`int`, *optional*, defaults to 0): of that order, together with the epoch.
        num_replicas (`int`, *optional*, defaults to 1): how many processes share the batches.
        rank (`int`, *optional*): which of them this is: it gets every `num_replicas`-th batch. With `None` batches of
            all come, for a loader that deals them out itself, as that of accelerate and `Trainer`.

    Raises:
        ValueError: for lengths below 1 or none, a batch that cannot hold the longest example, or a rank out of range.

    Example:

    ```python
    >>> from polyscale.training import TokenBatchSampler

    >>> sampler = TokenBatchSampler([5, 2, 2, 5, 1, 3], max_tokens=12, shuffle=False)
    >>> list(sampler)
    [[0], [1, 3], [2, 4, 5]]
    ```
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int | None = None,
    ):
        if isinstance(lengths, str | Mapping) or not isinstance(lengths, Iterable):
            raise ValueError(f"`lengths` must be a sequence of ints, got {lengths!r}.")
        self.lengths = [check_int("lengths", length, minimum=1) for length in lengths]
        if not self.lengths:
            raise ValueError("`lengths` is empty: it must hold the number of tokens of each example.")
        self.max_tokens = check_int("max_tokens", max_tokens)
        longest = max(self.lengths)
        if self.max_tokens < longest:
            raise ValueError(
                f"`max_tokens` must be at least {longest}, the tokens of the longest example, got {max_tokens}."
            )
        check_int("num_replicas", num_replicas, minimum=1)
        if rank is not None and not 0 <= check_int("rank", rank) < num_replicas:
            raise ValueError(f"`rank` must be from 0 to {num_replicas - 1}, got {rank}.")
        if not isinstance(shuffle, bool):
            raise ValueError(f"`shuffle` must be True or False, got {shuffle!r}.")
        self.shuffle = shuffle
        self.seed = check_int("seed", seed)
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        # The batch with the fewest tokens has at most the mean, and gets at most the longest example on top of it.
        room = self.max_tokens - longest
        needed = -(-sum(self.lengths) // room) if room else len(self.lengths)
        self.num_batches = -(-min(needed, len(self.lengths)) // num_replicas) * num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.epoch = check_int("epoch", epoch)

    def __len__(self) -> int:
        return self.num_batches if self.rank is None else self.num_batches // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        order = range(len(self.lengths))
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed + self.epoch) % (1 << 63))
            order = torch.randperm(len(order), generator=generator).tolist()
        batches = [[] for _ in range(self.num_batches)]
        fewest = [(0, 0, batch) for batch in range(self.num_batches)]  # tokens, examples, batch
        for example in order:
            tokens, count, batch = fewest[0]
            batches[batch].append(example)
            heapq.heapreplace(fewest, (tokens + self.lengths[example], count + 1, batch))
        for place, batch in enumerate(batches):
            if not batch:
                batch.append(order[place % len(order)])
        yield from batches if self.rank is None else batches[self.rank :: self.num_replicas]


__all__ = ["TokenBatchSampler"]
