"""Two processes with fully sharded weights, each with budgets of its own: as one process with all images."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
)


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "num_labels": 3}
# of each process: as many different budgets as images, and one
BUDGETS = {
    "flexivit": ("patch_size", [[(4, 4), (8, 8), (16, 16)], [(8, 8), (8, 8), (8, 8)]]),
    "quadtree_vit": ("num_tokens", [[4, 31, 64], [25, 25, 25]]),
}


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "flexivit":
        return FlexiViTForImageClassification(FlexiViTConfig(**SHAPE, base_patch_size=8))
    return QuadtreeViTForImageClassification(QuadtreeViTConfig(**SHAPE, min_patch_size=4, max_patch_size=16))


def work(rank: int, name: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)
    argument, budgets = BUDGETS[name]
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    reference, model = make_model(name), make_model(name)
    reference(images, labels=labels, **{argument: budgets[0] + budgets[1]}).loss.backward()
    for part in (model.base_model.embeddings, *model.base_model.layers, model):
        fully_shard(part)
    mine = slice(3 * rank, 3 * rank + 3)
    model(images[mine], labels=labels[mine], **{argument: budgets[rank]}).loss.backward()
    for (weight_name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is not None:
            assert_close(weight.grad.full_tensor(), expected.grad, atol=1e-5, rtol=1e-4, msg=weight_name)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_each_process_may_have_budgets_of_its_own(name, tmp_path):
    mp.spawn(work, args=(name, str(tmp_path)), nprocs=2)
