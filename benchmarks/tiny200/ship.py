"""Writes a trained checkpoint as it ships: bfloat16 weights that load as float32, and the sizes it was trained with.

    python benchmarks/tiny200/ship.py TRAINED_FOLDER OUTPUT_FOLDER --set patch_size=8 --set train_patch_sizes=[4,8,16]

With `--float8` the matrices of the layers are stored as float8 (e4m3): half of the size, and they too load as float32.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from polyscale.training.train import store_weights_as


def store_matrices_as_float8(folder: Path) -> None:
    """Rounds the matrices of the layers to three bits behind the point; norms, biases and both ends stay."""
    path = folder / "model.safetensors"
    weights = {
        name: weight.to(torch.float8_e4m3fn) if weight.ndim == 2 and ".layers." in name else weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def forget_folders(folder: Path) -> None:
    """Removes from the config where the model inside another one was loaded from."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for inner in config.values():
        if isinstance(inner, dict):
            inner.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="fields of the config")
    parser.add_argument("--float8", action="store_true", help="for the matrices of the layers")
    arguments = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(arguments.trained, dtype=torch.float32)
    for field, value in (setting.split("=", 1) for setting in arguments.set):
        if not hasattr(model.config, field):
            parser.error(f"--set {field}: {type(model.config).__name__} has no such field")
        setattr(model.config, field, json.loads(value))
    model.set_attn_implementation("sdpa")
    model.save_pretrained(arguments.output)
    forget_folders(arguments.output)
    store_weights_as(arguments.output, "bfloat16")
    if arguments.float8:
        store_matrices_as_float8(arguments.output)
    AutoImageProcessor.from_pretrained(arguments.trained).save_pretrained(arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
