"""Trains a classifier on TinyImageNet-200 at budgets drawn anew for each step, for a given time or number of images.

    python benchmarks/tiny200/train_tiny200.py ARRAYS_FOLDER START_FOLDER OUTPUT_FOLDER --minutes 90 \
        --budgets 4 5 6 8 10 12 16 21 32 --probs 3 3 5 20 12 17 30 5 5 --early-probs 0 0 0 4 10 30 46 5 5

START_FOLDER is a checkpoint of this library: `inherit_clip.py` makes one, and a FlexiViT converted to a Quadtree ViT
is another (`--budget-argument num_tokens`). With `--minutes` the learning rate follows the clock: warm-up, then a
cosine to zero at the end of the time, however fast the machine is. With `--images` it follows the images seen: for a
machine that has time for it now and then. Interrupted, the same command goes on where the last save was.

With `--embeddings`, made by clip_teacher.py or lite_teacher.py, images that have one are also taught by it: the
student's pooled tokens, through a linear layer that is thrown away afterwards, point where the embedding does, and its
classes follow the probe's. lite_teacher.py embeds augmented views: then the student sees these, one view an epoch.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clip_teacher import fit_probe
from tiny_images import class_balanced, load_split, normalize, view_of
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

import polyscale  # noqa: F401 (registers the families)
from polyscale.utils.validation import to_pair


class Teacher:
    """Cached embeddings of training images, or of several views of them, and the probe on them."""

    def __init__(self, folder: Path, num_images: int):
        views = sorted(folder.glob("embeddings_*.npy"))
        self.num_views = len(views)
        self.embeddings = [np.load(file, mmap_mode="r") for file in views or [folder / "embeddings.npy"]]
        indices = torch.arange(num_images) if views else torch.from_numpy(np.load(folder / "indices.npy"))
        self.rows = torch.full((num_images,), -1).scatter(0, indices, torch.arange(len(indices)))
        self.probe = torch.load(folder / "probe.pt", weights_only=True)

    def loss(
        self, logits: torch.Tensor, pooled: torch.Tensor, adapter: nn.Linear, indices: torch.Tensor, view: int
    ) -> torch.Tensor:
        known = self.rows[indices] >= 0
        if not known.any():
            return logits.new_zeros(())
        embeddings = torch.from_numpy(self.embeddings[view][self.rows[indices[known]].numpy()]).float()
        teacher_logits = F.linear(embeddings, self.probe["weight"], self.probe["bias"])
        classes = F.kl_div(logits[known].log_softmax(-1), teacher_logits.softmax(-1), reduction="none").sum(-1)
        features = 1 - F.cosine_similarity(adapter(pooled[known]), embeddings, dim=-1)
        return (classes + features).sum() / len(indices)


def augment(images: np.ndarray, generator: np.random.Generator, shift: int = 6) -> np.ndarray:
    """Mirrors half of the images, and moves each by up to `shift` pixels; the borders are reflected."""
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    rows, columns = generator.integers(0, 2 * shift + 1, (2, len(images)))
    moved = windows[np.arange(len(images)), rows, columns].transpose(0, 2, 3, 1)
    mirrored = generator.random(len(images)) < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    return moved


def classifier_of(model: PreTrainedModel) -> nn.Linear:
    return model.head if isinstance(model.head, nn.Linear) else model.head.classifier


def sized(pixel_values: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Enlarged to the size that the model's image processor makes."""
    size = to_pair(model.config.image_size)
    if pixel_values.shape[-2:] == size:
        return pixel_values
    return F.interpolate(pixel_values, size=size, mode="bilinear")


def pooled_and_logits(
    model: PreTrainedModel, pixel_values: torch.Tensor, **budget
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model.base_model(pixel_values, **budget)
    pooled = outputs.pooler_output
    if isinstance(model.head, nn.Linear):
        return pooled, model.head(pooled)
    return pooled, model.head(pooled, outputs.last_hidden_state)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, images: np.ndarray, labels: torch.Tensor, batch_size: int = 100, **budget
) -> float:
    model.eval()
    right = 0
    for start in range(0, len(images), batch_size):
        pixel_values = sized(normalize(images[start : start + batch_size]), model).to(model.dtype)
        logits = model(pixel_values, **budget).logits
        right += (logits.argmax(-1) == labels[start : start + batch_size]).sum().item()
    model.train()
    return right / len(images)


@torch.no_grad()
def start_classifier(model: PreTrainedModel, images: np.ndarray, labels: torch.Tensor, **budget) -> None:
    """Sets the classifier to a ridge probe on the pooled tokens of `images`."""
    batches = [images[start : start + 100] for start in range(0, len(images), 100)]
    pixels = (sized(normalize(batch), model) for batch in batches)
    pooled = torch.cat([model.base_model(pixel_values, **budget).pooler_output for pixel_values in pixels])
    probe = fit_probe(pooled, labels, model.config.num_labels)
    classifier_of(model).weight.copy_(probe["weight"])
    classifier_of(model).bias.copy_(probe["bias"])


def images_of_step(arguments: argparse.Namespace, model: PreTrainedModel, budget: dict) -> int:
    """The batch size, or fewer where their tokens would be more than `--tokens-per-step`."""
    if not arguments.tokens_per_step:
        return arguments.batch_size
    tokens = model.config.num_tokens_for(**budget)
    return max(1, min(arguments.batch_size, arguments.tokens_per_step // tokens))


def parameter_groups(modules: list[nn.Module], weight_decay: float) -> list[dict]:
    """Weight decay for matrices only."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim == 2 or p.ndim == 4], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim != 2 and p.ndim != 4], "weight_decay": 0.0},
    ]


def make_optimizers(arguments: argparse.Namespace, model: PreTrainedModel, adapter: nn.Linear) -> list:
    """AdamW for all parameters, or with `--muon` for all but the matrices of the layers, which Muon trains."""
    muon = arguments.muon_learning_rate
    matrices = [p for name, p in model.named_parameters() if muon and p.ndim == 2 and ".layers." in name]
    taken = {id(parameter) for parameter in matrices}
    groups = parameter_groups([model, adapter], arguments.weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    optimizers = [torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)]
    if matrices:
        decay = arguments.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=muon, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def take_gradients(model: PreTrainedModel, worker: PreTrainedModel) -> None:
    """Moves the gradients of the bfloat16 copy to the float32 weights."""
    if worker is model:
        return
    for weight, copied in zip(model.parameters(), worker.parameters(), strict=True):
        weight.grad = None if copied.grad is None else copied.grad.float()
        copied.grad = None


@torch.no_grad()
def give_weights(model: PreTrainedModel, worker: PreTrainedModel) -> None:
    """Rounds the float32 weights into the bfloat16 copy."""
    if worker is model:
        return
    for weight, copied in zip(model.parameters(), worker.parameters(), strict=True):
        copied.copy_(weight)


def save_all(folder: Path, model: PreTrainedModel, state: dict) -> None:
    """The checkpoint, and what resuming needs; the state last, by a rename."""
    model.save_pretrained(folder)
    partial = folder / "state.partial"
    torch.save(state | {"model": model.state_dict()}, partial)
    partial.replace(folder / "state.pt")


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    images, labels = load_split(arguments.arrays, "train")
    val_images, val_labels = load_split(arguments.arrays, "val")
    quick = class_balanced(val_labels, arguments.quick_per_class, torch.Generator().manual_seed(0))
    quick_images, quick_labels = val_images[quick.numpy()], val_labels[quick]
    attention = "eager" if arguments.bf16 else "sdpa"  # the faster of the two on CPUs
    model = AutoModelForImageClassification.from_pretrained(arguments.start, attn_implementation=attention)
    AutoImageProcessor.from_pretrained(arguments.start).save_pretrained(arguments.output)
    budgets = [{arguments.budget_argument: budget} for budget in arguments.budgets] or [{}]
    probs = np.array(arguments.probs or [1.0], dtype=float)
    early_probs = np.array(arguments.early_probs or probs, dtype=float)
    shown = [budgets[index] for index in np.argsort(-probs)[:2]]

    teacher = Teacher(arguments.embeddings, len(labels)) if arguments.embeddings else None
    adapter = nn.Linear(classifier_of(model).in_features, teacher.embeddings[0].shape[1] if teacher else 1)
    optimizers = make_optimizers(arguments, model, adapter)
    step, trained, elapsed = 0, 0, 0.0
    resumed = arguments.output / "state.pt"
    if resumed.exists():
        state = torch.load(resumed, weights_only=True)
        model.load_state_dict(state["model"])
        adapter.load_state_dict(state["adapter"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step, trained, elapsed = state["step"], state["trained"], state["elapsed"]
        print(f"goes on at step {step}, after {elapsed / 60:.1f} minutes")
    elif arguments.probe_per_class:
        chosen = class_balanced(labels, arguments.probe_per_class, torch.Generator().manual_seed(1))
        start_classifier(model, images[chosen.numpy()], labels[chosen], **shown[0])
        for budget in shown:
            print(
                f"before training, {budget}: top-1 {accuracy(model, quick_images, quick_labels, **budget):.4f}",
                flush=True,
            )

    generator = np.random.default_rng((arguments.seed, step))
    order, position, epoch = torch.randperm(len(labels)), 0, trained // len(labels)
    began, saved, seen, losses = time.monotonic() - elapsed, time.monotonic(), 0, []
    window_began = time.monotonic()
    worker = copy.deepcopy(model).to(torch.bfloat16) if arguments.bf16 else model
    worker.train()
    while True:
        if arguments.minutes:
            progress = (time.monotonic() - began) / (60 * arguments.minutes)
        else:
            progress = trained / arguments.images
        finished = progress >= 1
        if finished or time.monotonic() - saved > 60 * arguments.save_minutes:
            now = time.monotonic()
            scores = [accuracy(worker, quick_images, quick_labels, **budget) for budget in shown]
            print(
                f"{progress:.3f} step {step}: {seen / (now - window_began):.0f} images/s, "
                f"loss {np.mean(losses or [0]):.3f}, "
                + ", ".join(f"{budget}: {score:.4f}" for budget, score in zip(shown, scores, strict=True)),
                flush=True,
            )
            state = {"adapter": adapter.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            state |= {"step": step, "trained": trained, "elapsed": now - began}
            save_all(arguments.output, model, state)
            saved = window_began = time.monotonic()
            seen, losses = 0, []
        if finished:
            break
        warm = min(1.0, progress / arguments.warmup)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if position + arguments.batch_size > len(order):
            order, position, epoch = torch.randperm(len(labels)), 0, epoch + 1
        weights = (1 - progress) * early_probs / early_probs.sum() + progress * probs / probs.sum()
        budget = budgets[generator.choice(len(budgets), p=weights / weights.sum())]
        taken = images_of_step(arguments, model, budget)
        indices = order[position : position + taken]
        position += taken
        view = epoch % teacher.num_views if teacher and teacher.num_views else 0
        if teacher and teacher.num_views:
            pixel_values = view_of(images[indices.numpy()], indices, view)
            mirrored = torch.from_numpy(generator.random(len(indices)) < 0.5)  # the teacher hardly minds
            pixel_values[mirrored] = pixel_values[mirrored].flip(-1)
        else:
            pixel_values = normalize(augment(images[indices.numpy()], generator))
        label_loss = 0.0
        for part in torch.arange(len(indices)).split(arguments.micro_batch_size):
            inputs = sized(pixel_values[part], model).to(worker.dtype)
            pooled, logits = (output.float() for output in pooled_and_logits(worker, inputs, **budget))
            targets = indices[part]
            loss = F.cross_entropy(logits, labels[targets], label_smoothing=arguments.label_smoothing)
            share = len(part) / len(indices)
            label_loss += share * loss.item()
            if teacher:
                loss = 0.5 * loss + teacher.loss(logits, pooled, adapter, targets, view)
            (share * loss).backward()
        losses.append(label_loss)
        take_gradients(model, worker)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        give_weights(model, worker)
        step += 1
        trained += len(indices)
        seen += len(indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("start", type=Path)
    parser.add_argument("output", type=Path)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--images", type=int)
    parser.add_argument("--budget-argument", default="patch_size")
    parser.add_argument("--budgets", type=int, nargs="+", default=[], help="none for a SparseFormer")
    parser.add_argument("--probs", type=float, nargs="+", help="of the budgets, at the end")
    parser.add_argument("--early-probs", type=float, nargs="+", help="at the start; they change over evenly")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=128, help="images whose gradients are taken at once")
    parser.add_argument("--tokens-per-step", type=int, default=0, help="at most; small patches then get fewer images")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--muon-learning-rate", type=float, default=0.0, help="trains the layers' matrices with Muon")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the time")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--probe-per-class", type=int, default=0, help="images to set the classifier with first")
    parser.add_argument("--quick-per-class", type=int, default=2, help="validation images of the progress lines")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--bf16", action="store_true", help="a bfloat16 copy works, for CPUs made for it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train(arguments)


if __name__ == "__main__":
    main()
