"""Released files of the methods' authors: downloaded once, into torch's cache."""

from pathlib import Path

import torch


def download_once(url: str, name: str) -> Path:
    """The local copy of a released file, downloaded at first use into torch's folder of checkpoints.

    Args:
        url (`str`): where it is.
        name (`str`): what a user calls it, for errors.

    Raises:
        ConnectionError: if it is not there yet and cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:  # what urllib raises
            raise ConnectionError(
                f"`{name}` is a released file, but {url} cannot be downloaded ({error}). Download it where there is a "
                "network and give the path of the file."
            ) from error
    return path


__all__ = ["download_once"]
