"""Video processor of SparseFormer."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import is_torchcodec_usable
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput, VideoMetadata, load_video

from ...utils.arrays import check_finite, map_images, readable_arrays, with_values_of_files, without_wrapping
from ...utils.images import to_rgb
from ...utils.processor_input import PROCESSOR_ERRORS, checked_options, option_error
from .image_processing_sparseformer import SparseFormerPixelFields


try:
    import av
except ImportError:  # files are then read by torchcodec, or refused
    av = None


# Options of a call that say what its values are.
_VALUES = ("do_rescale", "rescale_factor", "do_convert_rgb")


def count_frames(video: str) -> int:
    """Frames of a file or address, counted without decoding them: Matroska and WebM do not say."""
    with av.open(video) as container:
        return sum(packet.pts is not None for packet in container.demux(video=0))


class SparseFormerVideoProcessor(SparseFormerPixelFields, BaseVideoProcessor):
    """Videos -> `pixel_values` (batch, frames, channels, height, width): resize of the short side, centre crop,
    normalise.

    Files and addresses are decoded with `av` or torchcodec; with `do_sample_frames=True`, `num_frames` frames are
    taken at equal distances.

    Raises:
        ValueError: for videos without frames, or with NaN or infinite values.
        ImportError: for a file where neither `av` nor torchcodec is installed.
    """

    do_sample_frames = False
    num_frames = 8
    model_input_names = ["pixel_values"]

    def fetch_videos(self, video_url_or_urls: str | list, sample_indices_fn: Callable | None = None):
        """Frames (frames, height, width, channels) and metadata of a file or address; lists of them for a list.

        As in transformers, which knows torchcodec alone, but with `av` where torchcodec cannot be used.
        """
        if is_torchcodec_usable(decode="video"):
            return super().fetch_videos(video_url_or_urls, sample_indices_fn=sample_indices_fn)
        if av is None:
            raise ImportError("Reading video files needs `av` (pip install 'polyscale[video]') or torchcodec.")
        if isinstance(video_url_or_urls, list):
            fetched = [self.fetch_videos(video, sample_indices_fn=sample_indices_fn) for video in video_url_or_urls]
            return tuple(zip(*fetched, strict=True))

        def choose_frames(metadata: VideoMetadata, **kwargs) -> np.ndarray:
            metadata.total_num_frames = metadata.total_num_frames or count_frames(video_url_or_urls)
            if sample_indices_fn is None:
                return np.arange(metadata.total_num_frames)
            return sample_indices_fn(metadata=metadata, **kwargs)

        return load_video(video_url_or_urls, backend="pyav", sample_indices_fn=choose_frames)

    def _prepare_input_videos(self, videos: VideoInput, **kwargs) -> list[torch.Tensor]:
        for video in videos:
            if len(video) == 0:
                raise ValueError("`videos` holds a video of zero frames; at least one frame is needed.")
        return super()._prepare_input_videos(videos, **kwargs)

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[VideosKwargs]) -> BatchFeature:
        """One video or a list of them, each an array (frames, height, width, channels) or a list of images.

        Images of PIL and values of arrays are read as image processors do: see `FiniteImagesMixin`.
        """
        if isinstance(videos, list | tuple) and not videos:
            raise ValueError("`videos` is empty: give at least one video.")
        kwargs = checked_options(self, kwargs)
        videos = map_images(videos, lambda frame: to_rgb(frame) if isinstance(frame, Image.Image) else frame)
        check_finite(videos, "videos")
        videos = readable_arrays(videos)
        own = {name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in _VALUES}
        if own["do_rescale"] and own["rescale_factor"] == 1 / 255:
            videos = with_values_of_files(videos, "videos", without_alpha=bool(own["do_convert_rgb"]))
        else:
            videos = without_wrapping(videos)
        try:
            batch = super().preprocess(videos, **kwargs)
        except PROCESSOR_ERRORS as error:
            if isinstance(error, OSError) or (isinstance(error, ValueError) and "`" in str(error)):
                raise  # it names what is wrong
            if named := option_error(self, error, kwargs):
                raise named from error
            raise ValueError(f"`videos` cannot be processed ({type(error).__name__}: {error}).") from error
        batch["pixel_values"] = batch.pop("pixel_values_videos")
        return batch


__all__ = ["SparseFormerVideoProcessor"]
