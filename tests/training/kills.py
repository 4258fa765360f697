"""A training run in a process of its own, which kills itself at a given access to the files of the run."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image


SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "drop_path_rate": 0.2}
# Python's audit events of everything that touches a file or folder.
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def write_images(folder: Path) -> None:
    """Twelve images of two classes to learn, four to evaluate on."""
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index, count]).integers(0, 100, (8, 8, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")


def run_until(kill_at: int | None, data: str, output: str, resume: bool, events: str) -> None:
    """Trains; dies at the access number `kill_at`, or writes the number of accesses to the file `events`."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in _EVENTS and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(output):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

    import torch

    from polyscale.training import make_recipe, train

    torch.set_num_threads(1)
    recipe = make_recipe(
        None,
        {**SHAPE, "train_patch_sizes": [2, 4]},
        epochs=2,
        batch_size=4,
        num_workers=0,
        save_steps=1,
        ema_decay=0.5,
        learning_rate=3e-3,
    )
    train(data, output, recipe if not resume else None, resume=resume, verbose=False)
    Path(events).write_text(str(count))


__all__ = ["run_until", "write_images"]
