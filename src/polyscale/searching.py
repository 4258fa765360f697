"""Search in what `polyscale embed` wrote: the images nearest to an image, or to words."""

import heapq
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from .embedding import (
    RECORD,
    check_same_model,
    image_outputs,
    open_shard,
    pooled_vectors,
    read_damaged,
    read_record,
    takes_texts,
)
from .layers.token_budget import budget_kwargs
from .loading import LoadedModel, checkpoint_source, load_base_model, reading
from .utils.images import is_image_file, open_pixels
from .utils.processors import process_images
from .utils.validation import check_path


_ROWS = 8192  # that are compared at once


class SearchResult(NamedTuple):
    """An image that was found.

    Attributes:
        file (`str`): its name, as in the column "file".
        score (`float`): cosine of the two embeddings.
    """

    file: str
    score: float


def _record(out: Path) -> dict:
    try:
        record = read_record(out)
    except OSError as error:
        raise ValueError(f"`out` {out} holds no embeddings ({RECORD}): write them with `embed_images`.") from error
    if record["tokens"]:
        raise ValueError(
            f"`out` {out} holds the tokens of each image (`tokens=True`): a search needs one vector each."
        )
    return record


def _rows(out: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and vectors of length 1, some thousands at a time."""
    for file in sorted(out.glob("part-*.parquet")):
        for batch in open_shard(file).iter_batches(batch_size=_ROWS):
            column = batch.column("embedding")
            vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
            yield batch.column("file").to_pylist(), _normalized(vectors)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@torch.inference_mode()
def _text_embedding(text: str, loaded: LoadedModel, tokenizer) -> np.ndarray:
    model = loaded.model
    # Padded to the full length, as SigLIP was trained; where there is a mask, padding changes nothing.
    length = getattr(model.config.text_config, "max_position_embeddings", None)
    inputs = tokenizer([text], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    known = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask") if name in inputs}
    return model.get_text_features(**known).pooler_output[0].float().cpu().numpy()


@torch.inference_mode()
def _image_embedding(path: Path, loaded: LoadedModel, budget: dict) -> np.ndarray:
    channels = getattr(loaded.model.config, "num_channels", 3)
    ((_, inputs),) = process_images(loaded.image_processor, [open_pixels(path)], channels)
    return pooled_vectors(image_outputs(loaded.model, inputs, budget))[0]


def _query_embedding(query: str | os.PathLike, record: dict, loaded: LoadedModel, model_name: str) -> np.ndarray:
    path = Path(query)
    if path.is_file():
        return _image_embedding(path, loaded, budget_kwargs(loaded.model.config, record["budget"]))
    if isinstance(query, os.PathLike) or is_image_file(path):
        raise FileNotFoundError(f"`query` {query} is no file.")
    if not takes_texts(loaded.model):
        raise ValueError(
            f"`query` {str(query)!r} is no image file, and the embeddings are of a {type(loaded.model).__name__}, "
            "which reads no texts. Give an image, or embed with a CLIP-like model."
        )
    source = checkpoint_source(model_name)
    with reading("model", source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return _text_embedding(str(query), loaded, tokenizer)


def search_embeddings(
    out: str | os.PathLike,
    query: str | os.PathLike,
    *,
    top: int = 5,
    device: str | int | torch.device | None = None,
    trust_remote_code: bool = False,
) -> list[SearchResult]:
    """The images of a corpus that are nearest to an image, or to words, by the cosine of their embeddings.

    The query is embedded by the model and at the budget that the folder's record names.

    Args:
        out (`str` or `os.PathLike`): the folder that `embed_images` wrote.
        query (`str` or `os.PathLike`): an image file, or, where the model is CLIP-like, a text.
        top (`int`, *optional*, defaults to 5): how many to give; fewer where there are fewer.
        device (*optional*): where the model runs; the machine's accelerator, else the CPU, when `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.

    Returns:
        `list[SearchResult]`: the nearest first.

    Raises:
        ValueError: for a folder without embeddings, or with tokens instead of one vector per image; a model that has
            changed since; a text for a model that reads none; a `top` below 1.
        OSError: if the query, or the checkpoint, is not there.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"`top` must be an int of at least 1, got {top!r}.")
    out = Path(check_path("out", out))
    check_path("query", query)
    record = _record(out)
    loaded = load_base_model(record["model"], device, trust_remote_code=trust_remote_code)
    check_same_model(out, record, loaded)
    vector = _normalized(_query_embedding(query, record, loaded, record["model"]))
    nearest: list[tuple[float, str]] = []
    found = sum(len(read_damaged(listed)) for listed in out.glob("damaged-*.json"))
    for names, vectors in _rows(out):
        found += len(names)
        nearest = heapq.nlargest(top, [*nearest, *zip((vectors @ vector).tolist(), names, strict=True)])
    if found < record["images"]:
        warnings.warn(
            f"`out` {out} holds {found} of its {record['images']} images: the others were not searched. Embed them "
            "(`embed_images` goes on where it stopped).",
            stacklevel=2,
        )
    return [SearchResult(file, score) for score, file in nearest]


__all__ = ["SearchResult", "search_embeddings"]
