"""Inflation: a SparseFormer for videos from one for images."""

import os
from pathlib import Path

import torch

from ...utils.weight_files import check_weight_files, quiet_loading
from .configuration_sparseformer import SparseFormerConfig
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .convert_sparseformer import MODEL_CLASSES, SparseFormerSource, load_official, save_source
from .geometry_sparseformer import inflate_rois
from .image_processing_sparseformer import SparseFormerImageProcessor
from .modeling_sparseformer import SparseFormerPreTrainedModel
from .video_processing_sparseformer import SparseFormerVideoProcessor


_VIDEO_CLASSES = {
    "SparseFormerModel": "SparseFormerVideoModel",
    "SparseFormerForImageClassification": "SparseFormerForVideoClassification",
    "SparseFormerModelWithProjection": "SparseFormerVideoModelWithProjection",
}
_PROCESSOR_FIELDS = ("size", "crop_size", "do_resize", "do_center_crop", "resample", "image_mean", "image_std")


def _with_zero_time(tensor: torch.Tensor) -> torch.Tensor:
    """(x, y) pairs along the first axis -> (x, y, 0) triples."""
    pairs = tensor.unflatten(0, (-1, 2))
    return torch.cat([pairs, torch.zeros_like(pairs[:, :1])], dim=1).flatten(0, 1)


def _inflate_tensor(name: str, tensor: torch.Tensor, config: SparseFormerVideoConfig) -> torch.Tensor:
    if name.endswith("embeddings.rois"):
        return inflate_rois(tensor, config.replicates)
    if name.endswith("embeddings.tokens") and not config.shared_token_embedding:
        return tensor.repeat(config.replicates, 1)
    if name.endswith(("sampling.offsets.weight", "sampling.offset_bias")):
        return _with_zero_time(tensor)
    if name.endswith("roi_adjustment.deltas.weight"):
        shift, scale = tensor.chunk(2)
        zero = torch.zeros_like(shift[:1])
        return torch.cat([shift, zero, scale, zero])
    return tensor.clone()


def inflate_state_dict(
    state_dict: dict[str, torch.Tensor], config: SparseFormerVideoConfig
) -> dict[str, torch.Tensor]:
    """The tensors of an image model -> those of a video model that, on one frame and with one replicate, equals it.

    RoIs are repeated, each copy over its own part of the time; offsets and changes of RoIs get a zero third
    coordinate; the encoding of time starts at zero.

    Args:
        state_dict: of `SparseFormerModel` or a model with a head on it.
        config: of the video model.
    """
    inflated = {name: _inflate_tensor(name, tensor, config) for name, tensor in state_dict.items()}
    for name, tensor in state_dict.items():
        if name.endswith("position_injection.projection.weight"):
            width = tensor.shape[0]
            time = name.replace(".projection.", ".time_projection.")
            inflated[time] = tensor.new_zeros(width, 2 * (width // 4))
    return inflated


def _read_image_model(
    source: str | os.PathLike | SparseFormerPreTrainedModel | SparseFormerSource,
) -> tuple[SparseFormerConfig, dict[str, torch.Tensor], str, SparseFormerImageProcessor | None]:
    if isinstance(source, SparseFormerSource):
        return source.config, source.state_dict, source.model_class.__name__, source.image_processor
    if isinstance(source, SparseFormerPreTrainedModel):
        return source.config, source.state_dict(), type(source).__name__, None
    path = Path(source)
    if not (path / "config.json").is_file():
        return _read_image_model(load_official(source))
    fields, _ = SparseFormerConfig.get_config_dict(path)
    if fields.get("model_type") != "sparseformer":
        raise ValueError(
            f"{path} holds a model of type {fields.get('model_type')!r}; only 'sparseformer' can be inflated."
        )
    name = (fields.get("architectures") or ["SparseFormerModel"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(f"`source` {path} is a {name}. What can be inflated: {', '.join(MODEL_CLASSES)}.")
    check_weight_files(path)
    with quiet_loading():
        model, info = MODEL_CLASSES[name].from_pretrained(path, output_loading_info=True)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise ValueError(f"The weights of `source` {path} do not fit its config: {', '.join(wrong[:8])}.")
    has_processor = (path / "preprocessor_config.json").is_file() or (path / "processor_config.json").is_file()
    processor = SparseFormerImageProcessor.from_pretrained(path) if has_processor else None
    return model.config, model.state_dict(), name, processor


def inflate_sparseformer(
    source: str | os.PathLike | SparseFormerPreTrainedModel | SparseFormerSource,
    replicates: int = 4,
    num_frames: int = 8,
) -> SparseFormerSource:
    """A video checkpoint from an image checkpoint.

    Args:
        source (`str`, `os.PathLike`, `SparseFormerPreTrainedModel` or `SparseFormerSource`): a checkpoint folder of a
            `sparseformer`, a file or published name of showlab/sparseformer, or a model.
        replicates (`int`, *optional*, defaults to 4): copies of each token along time.
        num_frames (`int`, *optional*, defaults to 8): frames that processors and pipelines sample.

    Returns:
        `SparseFormerSource`.

    Raises:
        ValueError: if the source is no image SparseFormer.
    """
    image_config, state_dict, architecture, processor = _read_image_model(source)
    if architecture not in _VIDEO_CLASSES:
        raise ValueError(f"Only image models can be inflated ({', '.join(_VIDEO_CLASSES)}), got {architecture}.")
    fields = {
        name: value for name, value in image_config.to_dict().items() if name not in ("model_type", "architectures")
    }
    config = SparseFormerVideoConfig(**{**fields, "replicates": replicates, "num_frames": num_frames})
    config.architectures = [_VIDEO_CLASSES[architecture]]
    return SparseFormerSource(config, inflate_state_dict(state_dict, config), processor)


def convert_sparseformer_video(
    source: str | os.PathLike | SparseFormerPreTrainedModel | SparseFormerSource,
    out: str | os.PathLike,
    replicates: int = 4,
    num_frames: int = 8,
) -> SparseFormerPreTrainedModel:
    """Inflates an image checkpoint, writes the video model and its video processor into the folder `out`, and returns
    the model.

    Arguments and errors: `inflate_sparseformer`.
    """
    inflated = inflate_sparseformer(source, replicates, num_frames)
    model = save_source(inflated, out)
    image_processor = inflated.image_processor or SparseFormerImageProcessor()
    fields = {name: getattr(image_processor, name) for name in _PROCESSOR_FIELDS}
    SparseFormerVideoProcessor(**fields, num_frames=num_frames).save_pretrained(out)
    return model


__all__ = ["convert_sparseformer_video", "inflate_sparseformer", "inflate_state_dict"]
