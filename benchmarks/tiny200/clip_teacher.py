"""The teacher: CLIP's ViT-B/16 image tower, read from an ONNX file with int8 weights, and a linear probe on it.

    python benchmarks/tiny200/clip_teacher.py ARRAYS_FOLDER TEACHER_ONNX EMBEDDINGS_FOLDER --images 20000

Writes `embeddings.npy` (float16, images x 512, of unit length), `indices.npy` (which training images they are of) and
`probe.pt` (weight and bias of a ridge classifier on them). Run again with more images, it goes on from where it was.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from tiny_images import class_balanced, load_split, normalize
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


def load_teacher(path: Path) -> CLIPVisionModelWithProjection:
    """The tower in float32; weights that the file holds as int8 are scaled back."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            name = node.input[1].removesuffix("_quantized")
            zero_point, scale = tensors[name + "_zero_point"], tensors[name + "_scale"]
            weight = (tensors[node.input[1]].astype(np.float32) - zero_point) * scale
            module = ".".join(node.name.strip("/").split("/")[:-1])  # "/vision_model/.../q_proj/MatMul_quant"
            state[f"{module}.weight"] = weight.T
    config = CLIPVisionConfig(patch_size=16, projection_dim=512)
    teacher = CLIPVisionModelWithProjection(config)
    targets = {name.removeprefix("vision_model."): name for name in teacher.state_dict()}
    renamed = {targets[name.removeprefix("vision_model.")]: torch.tensor(value) for name, value in state.items()}
    teacher.load_state_dict(renamed)
    return teacher.eval()


def enlarge(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """(images, 3, height, width) -> (images, 3, size, size)"""
    return F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)


@torch.no_grad()
def embed(teacher: CLIPVisionModelWithProjection, images: np.ndarray, size: int) -> torch.Tensor:
    """(images, 64, 64, 3) uint8 -> (images, 512), of unit length"""
    pixel_values = enlarge(normalize(images), size)
    return F.normalize(teacher(pixel_values, interpolate_pos_encoding=True).image_embeds, dim=-1)


def fit_probe(embeddings: torch.Tensor, labels: torch.Tensor, num_classes: int = 200) -> dict[str, torch.Tensor]:
    """A classifier by ridge regression of one-hot labels, its logits scaled to the least cross entropy."""
    mean = embeddings.mean(dim=0)
    centred = (embeddings - mean).double()
    targets = F.one_hot(labels, num_classes).double() - 1 / num_classes
    gram = centred.T @ centred
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, centred.T @ targets).T.float()
    logits = centred.float() @ weight.T
    scales = torch.logspace(0, 3, 61)
    scale = min(scales.tolist(), key=lambda value: F.cross_entropy(value * logits, labels).item())
    return {"weight": scale * weight, "bias": -scale * weight @ mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=160, help="pixels that images are enlarged to")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save-model", type=Path, help="folder for the tower and its image processor, as CLIP has it")
    arguments = parser.parse_args()

    images, labels = load_split(arguments.arrays, "train")
    order = class_balanced(labels, len(labels) // 200, torch.Generator().manual_seed(0))[: arguments.images]
    teacher = load_teacher(arguments.teacher)
    if arguments.save_model is not None:
        teacher.save_pretrained(arguments.save_model)
        CLIPImageProcessor().save_pretrained(arguments.save_model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "embeddings.npy"
    done = [torch.from_numpy(np.load(file))] if file.exists() else []
    count, saved = sum(map(len, done)), time.monotonic()
    while count < len(order):
        indices = order[count : count + arguments.batch_size].numpy()
        done.append(embed(teacher, images[indices], arguments.size).half())
        count += len(indices)
        if count == len(order) or time.monotonic() - saved > 60:
            np.save(file, torch.cat(done).numpy())
            np.save(arguments.output / "indices.npy", order[:count].numpy())
            saved = time.monotonic()
            print(f"{count} images", flush=True)
    embeddings = torch.cat(done)[: len(order)].float()
    torch.save(fit_probe(embeddings, labels[order]), arguments.output / "probe.pt")


if __name__ == "__main__":
    main()
