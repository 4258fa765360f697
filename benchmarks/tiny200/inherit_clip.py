"""Makes a small FlexiViT of CLIP's ViT-B/16 by least squares, layer by layer: the weights that training starts from.

    python benchmarks/tiny200/inherit_clip.py ARRAYS_FOLDER TEACHER_ONNX OUTPUT_FOLDER

The student's residual stream is the teacher's, projected onto the principal components of the teacher's hidden states.
Each student layer stands for one or two layers of the teacher: it takes over the attention heads and the MLP neurons
that write most into that projection. Their inputs (queries, keys, values, pre-activations) and outputs are linear in
what the student has, so that all its matrices are solutions of ridge regressions on a few hundred images. There is no
gradient step: it costs one pass of the teacher over these images, and the student knows something before training.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clip_teacher import enlarge, load_teacher
from tiny_images import MEAN, STD, class_balanced, load_split, normalize
from torch import nn
from transformers import CLIPVisionModelWithProjection

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTImageProcessor


# The teacher's layers that each of the student's eight stands for.
LAYER_GROUPS = ((0,), (1, 2), (3, 4), (5, 6), (7, 8), (9,), (10,), (11,))
# The teacher sees 64-pixel images at 160 pixels, patches of 16; the student at 80, patches of 8: 10 x 10 tokens both.
TEACHER_SIZE, STUDENT_SIZE, PATCH_SIZE = 160, 80, 8
CLS_WEIGHT = 20.0
CHUNK = 50


class Ridge:
    """Weighted ridge regression from running sums: `add` data as it comes, then `solve`."""

    def __init__(self):
        self.gram = self.cross = 0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """(rows, features), (rows, outputs), (rows,)"""
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        weighted = (inputs * weights[:, None]).T
        self.gram = self.gram + (weighted @ inputs).double()
        self.cross = self.cross + (weighted @ targets).double()

    def solve(self, penalty: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (outputs, features) and bias (outputs,) of a linear layer; the bias is not penalised."""
        diagonal = penalty * self.gram.diagonal()[:-1].mean() * torch.ones(len(self.gram))
        diagonal[-1] = 0
        solution = torch.linalg.solve(self.gram + diagonal.double().diag(), self.cross).float()
        return solution[:-1].T.contiguous(), solution[-1].clone()

    def fit(self, layers: list[nn.Linear]) -> None:
        """Writes the solution into layers whose outputs, side by side, are the targets."""
        weight, bias = self.solve()
        sizes = [layer.out_features for layer in layers]
        for layer, layer_weight, layer_bias in zip(layers, weight.split(sizes), bias.split(sizes), strict=True):
            layer.weight.copy_(layer_weight)
            layer.bias.copy_(layer_bias)


def standardize(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(hidden_states, hidden_states.shape[-1:])


def token_weights(hidden_states: torch.Tensor) -> torch.Tensor:
    """(images, tokens, width) -> (images * tokens,): CLS counts more than one patch."""
    weights = torch.ones(hidden_states.shape[:2])
    weights[:, 0] = CLS_WEIGHT
    return weights.flatten()


def split_heads(tensor: torch.Tensor, width: int = 64) -> torch.Tensor:
    return tensor.unflatten(-1, (-1, width)).transpose(1, 2)  # (images, heads, tokens, width)


class TeacherLayer:
    """One layer of the teacher, and how much each of its heads and neurons writes into the student's stream."""

    def __init__(self, layer: nn.Module, basis: torch.Tensor):
        self.layer = layer
        self.out = basis.T @ layer.self_attn.out_proj.weight  # (student width, teacher width)
        self.fc2_norms = (basis.T @ layer.mlp.fc2.weight).norm(dim=0)
        self.inputs, self.middles = [], []
        self.head_scores, self.neuron_scores = 0, 0

    def queries_keys_values(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        hidden_states = self.layer.layer_norm1(hidden_states)
        attention = self.layer.self_attn
        return [projection(hidden_states) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def pre_activations(self, middle: torch.Tensor) -> torch.Tensor:
        return self.layer.mlp.fc1(self.layer.layer_norm2(middle))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the layer, keeps its two inputs, and adds to the scores."""
        query, key, value = map(split_heads, self.queries_keys_values(hidden_states))
        context = F.scaled_dot_product_attention(query, key, value)  # (images, heads, tokens, 64)
        weights = token_weights(hidden_states).view(hidden_states.shape[:2])
        written = torch.einsum("bhtc,whc->bthw", context, self.out.unflatten(1, (-1, 64)))
        spread = (written - written.mean(dim=0, keepdim=True)).square().sum(dim=-1)  # what is constant, biases hold
        self.head_scores = self.head_scores + (spread * weights[..., None]).sum(dim=(0, 1))

        middle = hidden_states + self.layer.self_attn.out_proj(context.transpose(1, 2).flatten(2))
        activations = self.layer.mlp.activation_fn(self.pre_activations(middle))
        variance = (activations - activations.mean(dim=0, keepdim=True)).square() * weights[..., None]
        self.neuron_scores = self.neuron_scores + variance.sum(dim=(0, 1)) * self.fc2_norms.square()

        self.inputs.append(hidden_states)
        self.middles.append(middle)
        return middle + self.layer.mlp.fc2(activations)


def hidden_basis(teacher: CLIPVisionModelWithProjection, pixel_values: torch.Tensor, width: int) -> torch.Tensor:
    """(teacher width, `width`), orthonormal: the principal components of the hidden states of all layers.

    They are turned so that the mean over the student's channels, which its LayerNorms take away, is the least of them.
    """
    covariance = 0
    for chunk in pixel_values.split(CHUNK):
        outputs = teacher.vision_model(
            enlarge(chunk, TEACHER_SIZE), interpolate_pos_encoding=True, output_hidden_states=True
        )
        for hidden_states in outputs.hidden_states:
            tokens = standardize(hidden_states)
            rows = tokens.flatten(0, 1) * token_weights(tokens).sqrt()[:, None]
            covariance = covariance + (rows.T @ rows).double()
    values, vectors = torch.linalg.eigh(covariance)
    print(f"{values[-width:].sum() / values.sum():.3f} of the hidden states' energy is in {width} components")
    components = vectors[:, -width:].float()  # the least first
    mirror = torch.full((width,), width**-0.5)
    mirror[0] -= 1
    return components @ (torch.eye(width) - 2 * torch.outer(mirror, mirror) / mirror.square().sum())


def inherit_embeddings(
    teacher: CLIPVisionModelWithProjection,
    student: FlexiViTForImageClassification,
    pixel_values: torch.Tensor,
    basis: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Patch kernel, positions, CLS and first LayerNorm. Returns both models' hidden states, chunk by chunk."""
    vision, model = teacher.vision_model, student.flexivit
    norm = vision.pre_layrnorm
    reading = basis * norm.weight[:, None]
    reading = reading - reading.mean(dim=0)  # the teacher's LayerNorm takes the mean away before it scales
    positions = vision.embeddings.position_embedding.weight @ reading
    grid = positions[1:].T.unflatten(1, (14, 14))[None]
    rows, columns = student.config.position_grid
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
    model.embeddings.position_embeddings.copy_(grid.flatten(2).transpose(1, 2))
    model.embeddings.prefix_tokens.cls_token.copy_(vision.embeddings.class_embedding @ reading + positions[0])

    patches_fit, norm_sums, teacher_states = Ridge(), 0, []
    for chunk in pixel_values.split(CHUNK):
        large = enlarge(chunk, TEACHER_SIZE)
        patches = F.unfold(enlarge(chunk, STUDENT_SIZE), PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
        embedded = vision.embeddings.patch_embedding(large).flatten(2).transpose(1, 2).flatten(0, 1)
        patches_fit.add(patches, embedded @ reading, torch.ones(len(patches)))
        teacher_states.append(norm(vision.embeddings(large, interpolate_pos_encoding=True)))
    weight, bias = patches_fit.solve(1e-5)
    projection = model.embeddings.patch_embeddings.projection
    projection.weight.copy_(weight.view_as(projection.weight))
    projection.bias.copy_(bias)

    embedded = [
        model.embeddings(enlarge(chunk, STUDENT_SIZE), patch_size=PATCH_SIZE)[0] for chunk in pixel_values.split(CHUNK)
    ]
    for tokens, target in zip(embedded, teacher_states, strict=True):
        weights = token_weights(tokens)[:, None]
        inputs, targets = standardize(tokens).flatten(0, 1), (target @ basis).flatten(0, 1)
        products = (inputs.square(), inputs, inputs * targets, targets, torch.ones_like(inputs))
        norm_sums = norm_sums + torch.stack([(product * weights).sum(dim=0) for product in products]).double()
    square, linear, cross, target, count = norm_sums
    scale = (cross - linear * target / count) / (square - linear.square() / count)
    model.pre_layernorm.weight.copy_(scale)
    model.pre_layernorm.bias.copy_((target - scale * linear) / count)
    return teacher_states, [model.pre_layernorm(tokens) for tokens in embedded]


def report(name: str, states: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Prints the share of the targets' variance over images that the student explains, for CLS and for patches."""
    state, target = torch.cat(states), torch.cat(targets)
    error = (state - target).square().sum(dim=-1)
    spread = (target - target.mean(dim=0)).square().sum(dim=-1)
    share = 1 - error.sum(dim=0) / spread.sum(dim=0)
    print(f"{name}: explains {share[0]:.2f} of CLS, {share[1:].mean():.2f} of patches", flush=True)


def inherit_layer(
    layer: nn.Module,
    sources: list[TeacherLayer],
    states: list[torch.Tensor],
    targets: list[torch.Tensor],
    basis: torch.Tensor,
) -> list[torch.Tensor]:
    """Fits a student layer to the teacher's layers in `sources`; returns the student's hidden states after it.

    Args:
        states: the student's hidden states before the layer.
        targets: the teacher's after it, in the student's basis.
    """
    num_heads = layer.attention.q_proj.out_features // layer.attention.head_dim
    best = torch.cat([source.head_scores for source in sources]).topk(num_heads).indices
    heads = [(sources[index // 12], slice(64 * (index % 12), 64 * (index % 12) + 64)) for index in best.tolist()]
    attention_fit, out_fit = Ridge(), Ridge()
    for chunk, state in enumerate(states):
        projected = {source: source.queries_keys_values(source.inputs[chunk]) for source in sources}
        wanted = [projected[source][part][..., columns] for part in range(3) for source, columns in heads]
        attention_fit.add(standardize(state).flatten(0, 1), torch.cat(wanted, -1).flatten(0, 1), token_weights(state))
    attention = layer.attention
    attention_fit.fit([attention.q_proj, attention.k_proj, attention.v_proj])

    contexts = []
    for chunk, state in enumerate(states):
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (split_heads(part(standardize(state))) for part in parts)
        contexts.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        middle = sources[-1].middles[chunk] @ basis
        out_fit.add(contexts[-1].flatten(0, 1), (middle - state).flatten(0, 1), token_weights(state))
    out_fit.fit([attention.o_proj])
    middles = [state + attention.o_proj(context) for state, context in zip(states, contexts, strict=True)]

    best = torch.cat([source.neuron_scores for source in sources]).topk(layer.mlp.fc1.out_features).indices
    chosen = [best[best // 3072 == index] % 3072 for index in range(len(sources))]
    first_fit, second_fit = Ridge(), Ridge()
    for chunk, middle in enumerate(middles):
        wanted = [
            source.pre_activations(source.middles[chunk])[..., neurons]
            for source, neurons in zip(sources, chosen, strict=True)
        ]
        first_fit.add(standardize(middle).flatten(0, 1), torch.cat(wanted, -1).flatten(0, 1), token_weights(middle))
    first_fit.fit([layer.mlp.fc1])
    for middle, target in zip(middles, targets, strict=True):
        activations = layer.mlp.activation(layer.mlp.fc1(standardize(middle)))
        second_fit.add(activations.flatten(0, 1), (target - middle).flatten(0, 1), token_weights(middle))
    second_fit.fit([layer.mlp.fc2])
    return [middle + layer.mlp(standardize(middle)) for middle in middles]


@torch.no_grad()
def inherit(
    teacher: CLIPVisionModelWithProjection, student: FlexiViTForImageClassification, images: np.ndarray
) -> None:
    pixel_values = normalize(images)
    basis = hidden_basis(teacher, pixel_values[:150], student.config.hidden_size)
    teacher_states, states = inherit_embeddings(teacher, student, pixel_values, basis)
    report("embeddings", states, [state @ basis for state in teacher_states])
    for index, group in enumerate(LAYER_GROUPS):
        sources = [TeacherLayer(teacher.vision_model.encoder.layers[number], basis) for number in group]
        for source in sources:
            teacher_states = [source.forward(state) for state in teacher_states]
        targets = [state @ basis for state in teacher_states]
        states = inherit_layer(student.flexivit.layers[index], sources, states, targets, basis)
        report(f"layer {index + 1} of {len(LAYER_GROUPS)}", states, targets)


def make_student(names: list[str]) -> FlexiViTForImageClassification:
    config = FlexiViTConfig(
        image_size=64,
        hidden_size=256,
        num_hidden_layers=len(LAYER_GROUPS),
        num_attention_heads=4,
        base_patch_size=PATCH_SIZE,
        position_grid=8,
        pre_norm=True,
        pooling="cls_mean",
        layer_norm_eps=1e-5,
        kernel_interpolation="bicubic",
        kernel_antialias=True,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
        attn_implementation="eager",
    )
    return FlexiViTForImageClassification(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per-class", type=int, default=5, help="training images per class to fit the weights on")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_split(arguments.arrays, "train")
    chosen = class_balanced(labels, arguments.per_class, torch.Generator().manual_seed(0))
    student = make_student(json.loads((arguments.arrays / "classes.json").read_text()))
    print(f"{student.num_parameters():,} parameters")
    inherit(load_teacher(arguments.teacher), student, images[chosen.numpy()])
    student.save_pretrained(arguments.output)
    FlexiViTImageProcessor(
        size={"height": 64, "width": 64},
        do_center_crop=False,
        crop_size={"height": 64, "width": 64},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
