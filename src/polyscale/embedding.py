"""Embeddings of many images, in sharded parquet files: the function behind `polyscale embed`."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .checkpoints import DEFAULT_CHECKPOINT
from .embedding_source import Contents, Item, content_of, items_of, times_of
from .layers.budget_choice import at_budget
from .layers.token_budget import budget_kwargs
from .loading import LoadedModel, load_base_model
from .utils.arrays import plain_values
from .utils.identity import changes_of, digest_of, processing_of, weights_digest
from .utils.images import UnreadableImageError
from .utils.outputs import check_output, only_writer, write_text, written_beside
from .utils.processors import process_images
from .utils.validation import check_flag, check_function
from .utils.vision_configs import base_num_prefix_tokens


RECORD = "embedding.json"
_AHEAD = 2  # batches that are decoded and resized while the model works on another one


class EmbeddingSummary(NamedTuple):
    """What `embed_images` did.

    Attributes:
        written (`int`): images embedded by this call.
        found (`int`): images whose embeddings were there already.
        damaged (`list[dict]`): "file" and "error" of each image that could not be read.
    """

    written: int
    found: int
    damaged: list[dict]


def _opened(items: Sequence[Item]) -> tuple[list[str], list[Image.Image], list[dict]]:
    """Names and images of what can be read, and what is wrong with the others."""
    names, images, damaged = [], [], []
    for item in items:
        try:
            images.append(item.open())
            names.append(item.name)
        except UnreadableImageError as error:
            damaged.append({"file": item.name, "error": str(error)})
    return names, images, damaged


def _prepared(items: Sequence[Item], loaded: LoadedModel) -> tuple[list[str], list, list[dict]]:
    names, images, damaged = _opened(items)
    channels = getattr(loaded.model.config, "num_channels", 3)
    try:
        return names, list(process_images(loaded.image_processor, images, channels)) if images else [], damaged
    except ValueError as error:  # at one of them, which is nothing for this model
        if len(images) == 1:
            return [], [], [*damaged, {"file": names[0], "error": f"{names[0]}: {error}"}]
    alone = [_prepared([item], loaded) for item in items]
    names, groups, _ = _prepared([item for item, (names, _, _) in zip(items, alone, strict=True) if names], loaded)
    return names, groups, [entry for _, _, entries in alone for entry in entries]


def _ahead(batches: Sequence[Sequence[Item]], prepare: Callable, num_workers: int) -> Iterator[tuple]:
    """`prepare(batch)` for each batch in order, some of them ahead in threads: Pillow and resizing free the lock."""
    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        waiting: deque[Future] = deque()
        remaining = iter(batches)
        for batch in remaining:
            waiting.append(pool.submit(prepare, batch))
            if len(waiting) > max(_AHEAD, num_workers):
                break
        while waiting:
            ready = waiting.popleft().result()
            for batch in remaining:
                waiting.append(pool.submit(prepare, batch))
                break
            yield ready


def takes_texts(model: PreTrainedModel) -> bool:
    """Whether a model is CLIP-like: it embeds texts beside images."""
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features")


def image_outputs(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], budget: Mapping[str, Any]
) -> ModelOutput:
    """What a model says about prepared images; of a CLIP-like one `pooler_output` is what compares with texts."""
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return (model.get_image_features if takes_texts(model) else model)(**inputs, **budget)


def pooled_vectors(outputs: ModelOutput) -> np.ndarray:
    """(images, width); a ConvNet pools to a map of one place."""
    return outputs.pooler_output.flatten(1).float().cpu().numpy()


def _num_prefix_tokens(model: PreTrainedModel) -> int:
    try:
        return base_num_prefix_tokens(getattr(model.config, "vision_config", model.config))
    except ValueError:  # its tokens are no grid of patches, so that none is known to stand in front of one
        return 0


@torch.inference_mode()
def _embed(loaded: LoadedModel, groups: list, count: int, tokens: bool, budget: Any) -> list[np.ndarray]:
    """One array per image: (width,), or with `tokens` (tokens, width), prefix tokens and padding left out."""
    model = loaded.model
    num_prefix = _num_prefix_tokens(model) if tokens else 0
    rows: list[np.ndarray | None] = [None] * count
    call = budget_kwargs(model.config, budget)
    for indices, inputs in groups:
        with at_budget(budget, "budget"):
            outputs = image_outputs(model, inputs, call)
        if tokens:
            mask = getattr(outputs, "token_mask", None)
            hidden = outputs.last_hidden_state.float().cpu()
            if hidden.ndim == 4:  # the map of a ConvNet: (batch, width, rows, columns)
                hidden = hidden.flatten(2).transpose(1, 2)
            hidden = hidden[:, num_prefix:]
            for row, index in enumerate(indices):
                rows[index] = (hidden[row] if mask is None else hidden[row, mask[row].cpu()]).numpy()
        else:
            if getattr(outputs, "pooler_output", None) is None:
                raise ValueError(
                    f"`model` of type {model.config.model_type!r} pools nothing: use `tokens=True`, or another model."
                )
            for index, pooled in zip(indices, pooled_vectors(outputs), strict=True):
                rows[index] = pooled
    return rows


def _table(names: list[str], rows: list[np.ndarray], tokens: bool, contents: Contents) -> pa.Table:
    if tokens:
        values = pa.array([row.tolist() for row in rows], pa.list_(pa.list_(pa.float32())))
    else:
        width = rows[0].shape[0] if rows else 1
        flat = pa.array(np.stack(rows).ravel() if rows else np.zeros(0, np.float32), pa.float32())
        values = pa.FixedSizeListArray.from_arrays(flat, width)
    columns = {"file": pa.array(names, pa.string()), "embedding": values}
    return pa.table(columns, metadata=contents.as_metadata())


def read_record(out: Path) -> dict[str, Any]:
    """What a folder holds the embeddings of.

    Raises:
        ValueError: for a file that does not say so.
        OSError: where there is none.
    """
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not {"source", "images", "model", "budget", "tokens"} <= record.keys():
        raise ValueError(f"`out` {out} holds a damaged {RECORD}: name another folder, or remove it.")
    return record


def open_shard(file: Path) -> pq.ParquetFile:
    """A file of embeddings.

    Raises:
        ValueError: for a damaged one.
    """
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and embed the images again.") from error


def _check_record(out: Path, record: dict[str, Any]) -> None:
    """Writes what is being embedded, or refuses to go on with something else."""
    path = out / RECORD
    if not path.exists():
        others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if others:
            raise ValueError(f"`out` {out} holds other files, such as {others[0]}: name a new or empty folder.")
        write_text(path, json.dumps(record, indent=2) + "\n")
        return
    if not any(out.glob("part-*.parquet")):  # a run that wrote nothing may be followed by any other
        write_text(path, json.dumps(record, indent=2) + "\n")
        return
    before = read_record(out)
    changes = changes_of(before, {name: value for name, value in record.items() if name in before})
    if changes:
        raise ValueError(
            f"`out` {out} holds embeddings of something else: {'; '.join(changes)}. Name another folder, or remove it."
        )


def check_same_model(out: Path, record: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Refuses a model that is no longer the one whose embeddings a folder holds.

    Raises:
        ValueError: for other weights, or images that are prepared otherwise.
    """
    now = _identity_of(loaded)
    changes = changes_of({name: record.get(name, value) for name, value in now.items()}, now)
    if changes:
        raise ValueError(
            f"`out` {out} holds embeddings of {record['model']!r} as it was: {'; '.join(changes)}. Embed the images "
            "again."
        )


def _identity_of(loaded: LoadedModel) -> dict[str, Any]:
    return {"weights": weights_digest(loaded.model), "processing": processing_of(loaded.image_processor)}


def embed_images(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: str | os.PathLike | LoadedModel = DEFAULT_CHECKPOINT,
    budget: Any = None,
    *,
    tokens: bool = False,
    batch_size: int = 32,
    shard_size: int = 4096,
    num_workers: int = 2,
    device: str | int | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddingSummary:
    """Embeds every image of a folder or data set and writes parquet files with the columns "file" and "embedding".

    Each shard is written beside its place and renamed, so that a killed run loses one shard at most; called again with
    the same arguments, it goes on, and embeds a shard again where one of its images was replaced under its name. Under
    `accelerate launch` every process embeds its share. Images that cannot be read are left out and listed in
    `damaged-*.json`.

    Args:
        source (`str` or `os.PathLike`): a folder of images, an image, parquet files, or the name of a data set on a
            hub.
        out (`str` or `os.PathLike`): the folder to write.
        model (`str`, `os.PathLike` or `LoadedModel`, *optional*, defaults to
            `polyscale.checkpoints.DEFAULT_CHECKPOINT`): name of a bundled checkpoint, local folder, or name on
            the hub, of any vision model; of a CLIP-like one, embeddings that compare with those of texts
            (`search_embeddings`).
        budget (*optional*): a value of its budget argument (a patch size, a number of tokens, scales).
        tokens (`bool`, *optional*, defaults to `False`): the tokens of each image, not one pooled vector.
        batch_size (`int`, *optional*, defaults to 32): images per forward pass.
        shard_size (`int`, *optional*, defaults to 4096): images per file.
        num_workers (`int`, *optional*, defaults to 2): threads that open and resize images while the model works.
        device (*optional*): where the model runs; the machine's accelerator, else the CPU, when `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.
        progress (`Callable`, *optional*): called with the number of images done and of all.

    Returns:
        `EmbeddingSummary`.

    Raises:
        ValueError: for a source without images, a budget that the model does not take, a number below 1, or an `out`
            that holds embeddings of something else: of other images, of a model with other weights, ...
        OSError: if there is no such checkpoint.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("num_workers", num_workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
    check_flag("tokens", tokens)
    check_function("progress", progress)
    out = check_output(out, "out", folder=True)
    items = items_of(source)
    if isinstance(model, LoadedModel):
        loaded, model_name = model, str(getattr(model.model.config, "name_or_path", ""))
    else:
        loaded, model_name = load_base_model(model, device, trust_remote_code=trust_remote_code), os.fspath(model)
    budget_kwargs(loaded.model.config, budget)  # refuses one where there is none to choose
    state = PartialState(cpu=not torch.accelerator.is_available())
    record = {
        "source": os.fspath(source),
        "images": len(items),
        "names": digest_of(item.name for item in items),
        "model": model_name,
        "budget": json.loads(json.dumps(plain_values(budget), default=str)),
        "tokens": tokens,
        "shard_size": shard_size,
        **_identity_of(loaded),
    }
    # Of another run there is another main process; those of one run write different shards.
    with only_writer(out, "out", "embedding") if state.is_main_process else nullcontext():
        with state.main_process_first():
            out.mkdir(parents=True, exist_ok=True)
            _check_record(out, record)
        shards = [items[start : start + shard_size] for start in range(0, len(items), shard_size)]
        own = {number: shards[number] for number in range(state.process_index, len(shards), state.num_processes)}
        try:
            return _embed_shards(own, out, loaded, tokens, budget, batch_size, num_workers, progress, len(items))
        except BaseException:
            if state.is_main_process and not any(out.glob("part-*.parquet")):  # it came to nothing, and leaves nothing
                (out / RECORD).unlink(missing_ok=True)
                if not any(out.iterdir()):
                    out.rmdir()
            raise


def _embed_shards(
    shards: Mapping[int, list[Item]],
    out: Path,
    loaded: LoadedModel,
    tokens: bool,
    budget: Any,
    batch_size: int,
    num_workers: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> EmbeddingSummary:
    """Writes the shards of one process that are not there yet."""
    written = found = 0
    damaged: list[dict] = []
    for number, items in shards.items():
        place, listed = out / f"part-{number:05d}.parquet", out / f"damaged-{number:05d}.json"
        if place.exists():
            shard = open_shard(place)
            contents = Contents.of_metadata(shard.schema_arrow.metadata)
            if contents is None or contents.are_those_of(items):
                found += shard.metadata.num_rows
                damaged += read_damaged(listed) if listed.exists() else []
                continue
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        names: list[str] = []
        rows: list[np.ndarray] = []
        unread: list[dict] = []
        times, digests = times_of(items), []

        def prepare(batch: Sequence[Item]) -> tuple:
            return list(map(content_of, batch)), *_prepared(batch, loaded)

        for batch_digests, batch_names, groups, wrong in _ahead(batches, prepare, num_workers):
            digests += batch_digests
            rows += _embed(loaded, groups, len(batch_names), tokens, budget)
            names += batch_names
            unread += wrong
            if progress is not None:
                progress(found + written + len(names) + len(unread), total)
        listed.unlink(missing_ok=True)  # of images that were replaced since
        if unread:
            write_text(listed, json.dumps(unread, indent=2) + "\n")
        with written_beside(place) as scratch:
            pq.write_table(_table(names, rows, tokens, Contents(times, digest_of(digests))), scratch)
        written += len(names)
        damaged += unread
    return EmbeddingSummary(written, found, damaged)


def read_damaged(listed: Path) -> list[dict]:
    """ "file" and "error" of the images of a shard that could not be read.

    Raises:
        ValueError: for a damaged list of them.
    """
    try:
        return [
            {"file": str(entry["file"]), "error": str(entry["error"])}
            for entry in json.loads(listed.read_text(encoding="utf-8"))
        ]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{listed} is damaged ({error}): remove it.") from error


__all__ = [
    "RECORD",
    "EmbeddingSummary",
    "check_same_model",
    "embed_images",
    "image_outputs",
    "open_shard",
    "pooled_vectors",
    "read_damaged",
    "read_record",
    "takes_texts",
]
