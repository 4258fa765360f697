from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sparseformer_reference import make_model, tiny_config
from transformers import pipeline

from polyscale.models.sparseformer import (
    SparseFormerForVideoClassification,
    SparseFormerVideoProcessor,
    video_processing_sparseformer,
)


LABELS = ["still", "left", "right"]
SHAPE = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}


def write_video(path: Path, num_frames: int = 12, seed: int = 0) -> Path:
    """A bright box that moves over a grey wall."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(num_frames):
            frame = np.full((32, 48, 3), 90, dtype=np.uint8)
            frame[8:24, 3 * index : 3 * index + 12, seed % 3] = 240
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode(path: Path) -> np.ndarray:
    """(frames, height, width, 3)"""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = tiny_config("video", num_labels=3, num_frames=4, initializer_range=0.2, **labels)
    make_model(SparseFormerForVideoClassification, config).save_pretrained(tmp_path / "model")
    SparseFormerVideoProcessor(**SHAPE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_the_pipeline_gives_what_the_model_says_of_the_same_frames(checkpoint, tmp_path, suffix):
    paths = [write_video(tmp_path / f"{seed}.{suffix}", seed=seed) for seed in (0, 1)]
    results = pipeline("video-classification", model=str(checkpoint))([str(path) for path in paths])

    model = SparseFormerForVideoClassification.from_pretrained(checkpoint).eval()
    processor = SparseFormerVideoProcessor(**SHAPE)
    for path, result in zip(paths, results, strict=True):
        frames = decode(path)
        assert len(frames) == 12
        inputs = processor(frames[[0, 3, 6, 9]], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].softmax(-1)
        assert [entry["label"] for entry in result] == [LABELS[i] for i in expected.argsort(descending=True)]
        scores = torch.tensor([entry["score"] for entry in result])
        torch.testing.assert_close(scores, expected.sort(descending=True).values)
    assert results[0] != results[1]


def test_the_processor_decodes_whole_files_and_counts_frames(tmp_path):
    path = write_video(tmp_path / "clip.mkv")
    processor = SparseFormerVideoProcessor(**SHAPE)
    pixels = processor(str(path), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, processor(decode(path), return_tensors="pt").pixel_values)
    with pytest.raises(ValueError, match="num_frames=13"):
        processor(str(path), do_sample_frames=True, num_frames=13)


def test_files_without_a_decoder_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(video_processing_sparseformer, "av", None)
    monkeypatch.setattr(video_processing_sparseformer, "is_torchcodec_usable", lambda **kwargs: False)
    with pytest.raises(ImportError, match=r"polyscale\[video\]"):
        SparseFormerVideoProcessor(**SHAPE)(str(path), return_tensors="pt")
