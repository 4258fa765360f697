"""Top-1 accuracy of a linear classifier on a model's frozen features: what the features know, without fine-tuning.

    python benchmarks/linear_probe.py MODEL DATA --set patch_size=4

The features are the model's final tokens (`pooler_output`, or CLS), standardised over the training images; the
classifier is a logistic regression with a small L2 penalty, fitted to its optimum by LBFGS: no learning rate, no seed.
"""

import argparse

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

import polyscale  # noqa: F401 (registers the families)
from polyscale.checkpoints import resolve_checkpoint
from polyscale.training.bootstrapping import final_token
from polyscale.training.data import evaluation_split, load_image_dataset
from polyscale_cli.arguments import parse_fields


@torch.no_grad()
def extract_features(
    model: PreTrainedModel, processor: BaseImageProcessor, rows: Dataset, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (pictures, width) and labels (pictures,)"""
    features, labels = [], []
    for batch in rows.iter(batch_size):
        pictures = processor([picture.convert("RGB") for picture in batch["image"]], return_tensors="pt")
        features.append(final_token(model, pictures["pixel_values"].to(model.device)).float().cpu())
        labels.append(torch.tensor(batch["label"]))
    return torch.cat(features), torch.cat(labels)


def fit(features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float) -> torch.nn.Linear:
    """The classifier with the least cross entropy plus `penalty` / 2 times its squared weights."""
    classifier = torch.nn.Linear(features.shape[1], num_classes)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(),
        max_iter=500,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + penalty / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="bundled checkpoint, folder or hub name that AutoModel loads")
    parser.add_argument("data", help="labelled pictures: folder, parquet file or folder, or hub name")
    parser.add_argument("--train-limit", type=int, default=5000, help="training pictures, the first ones")
    parser.add_argument("--test-limit", type=int, help="test pictures, the first ones; all by default")
    parser.add_argument("--penalty", type=float, default=1e-2, help="of the squared weights")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--set", action="append", dest="fields", metavar="FIELD=JSON", help="field of the config")
    arguments = parser.parse_args()

    name = resolve_checkpoint(arguments.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = AutoModel.from_pretrained(name, **parse_fields(arguments.fields)).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name)
    splits = load_image_dataset(arguments.data)
    parts = ((splits["train"], arguments.train_limit), (splits[evaluation_split(splits)], arguments.test_limit))
    (train, train_labels), (test, test_labels) = (
        extract_features(model, processor, rows.select(range(len(rows))[:limit]), arguments.batch_size)
        for rows, limit in parts
    )
    deviation, mean = torch.std_mean(train, dim=0)
    train, test = (train - mean) / (deviation + 1e-6), (test - mean) / (deviation + 1e-6)
    classifier = fit(train, train_labels, splits["train"].features["label"].num_classes, arguments.penalty)
    with torch.no_grad():
        train_top1, top1 = (
            (classifier(features).argmax(dim=1) == labels).float().mean().item()
            for features, labels in ((train, train_labels), (test, test_labels))
        )
    print(
        f"{arguments.model}: top-1 {top1:.1%} of {len(test)} test pictures ({train_top1:.1%} of {len(train)} learned)"
    )


if __name__ == "__main__":
    main()
