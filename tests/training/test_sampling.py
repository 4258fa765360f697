"""Batches drawn by their number of tokens."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from polyscale import QuadtreeViTConfig, QuadtreeViTForImageClassification
from polyscale.training import TokenBatchSampler


LENGTHS = torch.randint(17, 258, (500,), generator=torch.Generator().manual_seed(0)).tolist()


def tokens_of(batches, lengths=LENGTHS):
    return [sum(lengths[example] for example in batch) for batch in batches]


def test_each_example_in_turn_goes_to_the_batch_with_the_fewest_tokens():
    sampler = TokenBatchSampler([5, 2, 2, 5, 1, 3], max_tokens=12, shuffle=False)
    assert list(sampler) == [[0], [1, 3], [2, 4, 5]]
    assert len(sampler) == 3
    assert list(TokenBatchSampler([5, 2, 2, 5, 1, 3], max_tokens=14, shuffle=False)) == [[0, 4, 5], [1, 2, 3]]


@pytest.mark.parametrize("max_tokens", [257, 300, 1024, 8192, 10**6])
def test_every_example_is_in_one_batch_and_none_is_too_full(max_tokens):
    sampler = TokenBatchSampler(LENGTHS, max_tokens)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(example for batch in batches for example in batch) == list(range(500))
        assert max(tokens_of(batches)) <= max_tokens
        assert len(batches) == len(sampler) > 0
        assert max(tokens_of(batches)) - min(tokens_of(batches)) <= 257
    if max_tokens == 8192:
        assert len(batches) == 9


def test_the_order_is_that_of_seed_and_epoch():
    first, again, other = (TokenBatchSampler(LENGTHS, 2048, seed=seed) for seed in (3, 3, 4))
    assert list(first) == list(first) == list(again)
    assert list(first) != list(other)
    before = list(first)
    first.set_epoch(1)
    assert list(first) != before
    again.set_epoch(1)
    assert list(first) == list(again)
    unshuffled = TokenBatchSampler(LENGTHS, 2048, shuffle=False)
    before = list(unshuffled)
    unshuffled.set_epoch(1)
    assert list(unshuffled) == before


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_processes_share_the_batches_evenly(num_replicas):
    ranks = [TokenBatchSampler(LENGTHS, 2048, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    dealt = TokenBatchSampler(LENGTHS, 2048, num_replicas=num_replicas)
    for epoch in range(2):
        for sampler in (dealt, *ranks):
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])} == {len(dealt) // num_replicas}
        assert sorted(example for share in shares for batch in share for example in batch) == list(range(500))
        # accelerate deals out the batches of all to the same effect
        shards = [BatchSamplerShard(dealt, num_replicas, rank) for rank in range(num_replicas)]
        assert [list(shard) for shard in shards] == shares


def test_few_examples_are_repeated_for_many_processes():
    batches = [
        next(iter(TokenBatchSampler([3, 4], 10, shuffle=False, num_replicas=5, rank=rank))) for rank in range(5)
    ]
    assert batches == [[0], [1], [0], [1], [0]]


@pytest.mark.parametrize(
    ("lengths", "arguments", "message"),
    [
        ([], {}, "`lengths` is empty"),
        ([3, 0], {}, "`lengths` must be at least 1, got 0"),
        ([3, 1.5], {}, "`lengths` must be an int, got 1.5"),
        ([3, 11], {}, "`max_tokens` must be at least 11"),
        ([3], {"num_replicas": 0}, "`num_replicas` must be at least 1"),
        ([3], {"num_replicas": 2, "rank": 2}, "`rank` must be from 0 to 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(lengths, arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(lengths, 10, **arguments)


def test_a_trainer_takes_it(tmp_path):
    torch.manual_seed(0)
    config = QuadtreeViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, min_patch_size=4, max_patch_size=16,
        split_threshold=0.2, num_labels=2,
    )  # fmt: skip
    images = torch.randn(12, 3, 32, 32)
    images[::3], images[1::3, :, :16] = 0, 0
    lengths = [count for count, _ in config.count_images(images)]
    assert set(lengths) == {4, 34, 64}
    dataset = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(images)]
    sampler, seen = TokenBatchSampler(lengths, max_tokens=192), []

    class TokenTrainer(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs["pixel_values"])
            return super().compute_loss(model, inputs, **kwargs)

    arguments = TrainingArguments(tmp_path, num_train_epochs=2, report_to=[], save_strategy="no", use_cpu=True)
    model = QuadtreeViTForImageClassification(config)
    trainer = TokenTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 2 * len(sampler) == len(seen)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert expected[: len(sampler)] != expected[len(sampler) :]
    for batch, examples in zip(seen, expected, strict=True):
        assert torch.equal(batch, images[examples])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"lengths": value}, "`lengths` must be a sequence of ints") for value in (None, 5, "345", {1: 2})),
        *(({"lengths": [1, value]}, "`lengths` must be") for value in (0, -1, True, 2.0, float("nan"), "3", None)),
        ({"lengths": []}, "`lengths` is empty"),
        ({"lengths": [1, 2, 11]}, "`max_tokens` must be at least 11, the tokens of the longest example, got 10"),
        *(({"max_tokens": value}, "`max_tokens` must be an int") for value in (True, 2.0, float("nan"), "5", None)),
        *(({"seed": value}, "`seed` must be an int") for value in ("a", float("nan"), True, None)),
        *(({"shuffle": value}, "`shuffle` must be True or False") for value in ("no", 0, None)),
        *(({"num_replicas": value}, "`num_replicas` must be") for value in (0, True, "2")),
        *(({"rank": value}, "`rank` must be") for value in (1, -1, True, "0")),
    ],
)
def test_arguments_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(**({"lengths": [1, 2], "max_tokens": 10} | change))


def test_epochs_are_ints_of_any_size():
    sampler = TokenBatchSampler([1, 2, 3], 10)
    for epoch in ("1", float("nan"), 1.5, True, None):
        with pytest.raises(ValueError, match="`epoch` must be an int"):
            sampler.set_epoch(epoch)
    for epoch in (-1, 1 << 80):
        sampler.set_epoch(epoch)
        assert sorted(example for batch in sampler for example in batch) == [0, 1, 2]
