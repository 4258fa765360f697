"""A SparseFormer out of a trained FlexiViT: the FlexiViT's blocks, behind a sampling fitted to its patch embedding.

    python benchmarks/tiny200/inherit_flexivit.py ARRAYS_FOLDER FLEXIVIT_FOLDER OUTPUT_FOLDER

Latent tokens start as a grid of cells. The early convolution and the first sampling are trained, alone and for a few
minutes, to give what the FlexiViT's patch embedding makes of these cells; its blocks and its CLS token are copied, its
LayerNorm before them becomes that of the transition between the two widths. After the first blocks a layer moves the
RoIs and samples again; it adds nothing at first, so that training starts from the FlexiViT.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_images import load_split, normalize, view_of
from torch import nn
from transformers import AutoImageProcessor

from polyscale import (
    FlexiViTForImageClassification,
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerImageProcessor,
)
from polyscale.models.sparseformer.convert_sparseformer_vit import load_vit_weights


FRONT_WIDTH = 128


def make_student(
    flexivit: FlexiViTForImageClassification, side: int, image_size: int, resampled_after: int
) -> SparseFormerForImageClassification:
    """A SparseFormer with side x side tokens whose first sampling is not fitted yet."""
    vit = flexivit.config
    blocks = [["attn", "mlp"] for _ in range(vit.num_hidden_layers)]
    blocks[resampled_after - 1] += ["roi_adj", "sampling_m"]
    config = SparseFormerConfig(
        num_latent_tokens=side * side,
        image_size=image_size,
        feature_width=32,
        num_sampling_points=16,
        widths=[FRONT_WIDTH] + [vit.hidden_size] * len(blocks),
        repeats=[1] * (1 + len(blocks)),
        operations=[["sampling_m"], *blocks],
        cls_token_layer=1,
        num_attention_heads=None,
        attention_head_width=vit.hidden_size // vit.num_attention_heads,
        hidden_act=vit.hidden_act,
        layer_norm_eps=vit.layer_norm_eps,
        mlp_ratio=vit.intermediate_size / vit.hidden_size,
        generator_width=32,
        mixing_bias=False,
        roi_drop_path=False,
        sampling_padding="border",
        pooling="mean",
        id2label=vit.id2label,
        label2id=vit.label2id,
    )
    student = SparseFormerForImageClassification(config)
    print(load_vit_weights(student, flexivit, layers=range(1, len(blocks) + 1)))
    base = student.sparseformer
    steps = torch.arange(side) / side
    top, left = torch.meshgrid(steps, steps, indexing="ij")
    corner = torch.stack([left, top], dim=-1).flatten(0, 1)
    nn.init.zeros_(base.layers[resampled_after].mixing.o_proj.weight)
    with torch.no_grad():
        base.embeddings.rois.copy_(torch.cat([corner, corner + 1 / side], dim=-1))
    return student


@torch.no_grad()
def patch_tokens(flexivit: FlexiViTForImageClassification, pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """What the first block of the FlexiViT sees on a grid of side x side patches: (images, 1 + side * side, width)"""
    patch = math.ceil(pixel_values.shape[-1] / side)
    pixel_values = F.interpolate(pixel_values, size=(side * patch, side * patch), mode="bicubic", antialias=True)
    return flexivit.flexivit(pixel_values, patch_size=patch, output_hidden_states=True).hidden_states[0]


def inherit_front(
    student: SparseFormerForImageClassification, flexivit: FlexiViTForImageClassification, example: torch.Tensor
) -> None:
    """Copies the CLS token, and the norm before the blocks into the transition."""
    base = student.sparseformer
    linear, norm = base.transitions["1"]
    norm.load_state_dict(flexivit.flexivit.pre_layernorm.state_dict())
    nn.init.orthogonal_(linear.weight)
    with torch.no_grad():
        base.embeddings.cls_token.copy_(example[0, :1])


def front(student: SparseFormerForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the student's first block sees, CLS left out: (images, tokens, width)"""
    base = student.sparseformer
    features = base.encode(pixel_values)
    tokens, rois = base.embeddings(len(pixel_values))
    return base.transitions["1"](base.layers[0](tokens, rois, features)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("flexivit", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--side", type=int, default=5, help="of the grid of latent tokens")
    parser.add_argument("--image-size", type=int, default=96, help="pixels that images are enlarged to")
    parser.add_argument("--resampled-after", type=int, default=2, help="blocks before the second sampling")
    parser.add_argument("--images", type=int, default=40_000, help="to fit the first sampling on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, _ = load_split(arguments.arrays, "train")
    flexivit = FlexiViTForImageClassification.from_pretrained(arguments.flexivit).eval()
    student = make_student(flexivit, arguments.side, arguments.image_size, arguments.resampled_after)
    size = (arguments.image_size, arguments.image_size)
    inherit_front(student, flexivit, patch_tokens(flexivit, normalize(images[:1]), arguments.side))
    base = student.sparseformer
    trained = [base.features, base.layers[0], base.transitions["1"][0]]
    parameters = [*base.embeddings.parameters(), *(p for module in trained for p in module.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    steps = arguments.images // arguments.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=steps)
    order, began, shares = torch.randperm(len(images)), time.monotonic(), []
    base.embeddings.rois.requires_grad_(False)
    for step in range(steps):
        chosen = order[step * arguments.batch_size : (step + 1) * arguments.batch_size].sort().values
        pixel_values = view_of(images[chosen.numpy()], chosen, 0)
        target = patch_tokens(flexivit, pixel_values, arguments.side)[:, 1:]
        given = front(student, F.interpolate(pixel_values, size=size, mode="bilinear"))
        loss = F.mse_loss(given, target) / target.var(dim=(0, 1)).mean()
        shares.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            rate = (step + 1) * arguments.batch_size / (time.monotonic() - began)
            print(f"{step + 1}/{steps}: {np.mean(shares[-100:]):.4f} of the variance left, {rate:.0f}/s", flush=True)
    base.embeddings.rois.requires_grad_(True)
    student.save_pretrained(arguments.output)
    pixels = AutoImageProcessor.from_pretrained(arguments.flexivit)
    processor = SparseFormerImageProcessor(
        size={"height": size[0], "width": size[1]},
        do_center_crop=False,
        crop_size={"height": size[0], "width": size[1]},
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
    )
    processor.save_pretrained(arguments.output)
    print(f"{arguments.output}: {student.num_parameters() / 1e6:.2f} million parameters")


if __name__ == "__main__":
    main()
