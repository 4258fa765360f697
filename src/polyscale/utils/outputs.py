"""Files that commands write: their places checked before the work, and each file whole or not there."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .validation import check_path


_UNWRITABLE = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EFBIG,
}


def check_output(path: str | os.PathLike, name: str = "output", folder: bool = False) -> Path:
    """Refuses a place where nothing can be written, before anything was worked for.

    Args:
        path (`str` or `os.PathLike`): the file, or with `folder` the folder, that is to be written.
        name (`str`, *optional*, defaults to `"output"`): of the argument, for errors.
        folder (`bool`, *optional*, defaults to `False`): whether it is a folder of files.

    Returns:
        `Path`: the place.

    Raises:
        ValueError: for no path, a folder in a file's place, a file or a link to nothing in a folder's, and where one
            may not write.
    """
    path = Path(check_path(name, path))
    if folder and path.is_symlink() and not path.exists():
        raise ValueError(f"`{name}` {path} is a link to nothing: make the folder it points to, or remove it.")
    if path.is_dir() != folder and path.exists():
        raise ValueError(
            f"`{name}` {path} is a {'file' if folder else 'folder'}: give a {'folder' if folder else 'file'}."
        )
    place = path if folder else path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"`{name}` {path} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"`{name}` {path} cannot be written: {place} is read-only.")
    return path


@contextmanager
def only_writer(path: str | os.PathLike, name: str, what: str) -> Iterator[None]:
    """Keeps other processes of this machine from writing to a place as long as the `with` block lasts.

    Args:
        path (`str` or `os.PathLike`): the place.
        name (`str`): of the argument that names it, for errors.
        what (`str`): is done, for errors: "conversion".

    Raises:
        ValueError: where another one writes to it.
    """
    home = os.path.expanduser("~")  # where there is none it stays as it is
    key = hashlib.sha256(f"{home}\n{Path(path).resolve()}".encode()).hexdigest()[:24]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"polyscale-{key}.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"`{name}` {path} is being written by another {what}. Wait for it or name another.") from None


def write_failure(error: BaseException, folder: Path) -> str | None:
    """Why nothing more can be written to a folder, if that is what an error says; torch and safetensors have errors of
    their own for it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        is_elsewhere = error.filename is not None and not str(error.filename).startswith(str(folder))
        return None if is_elsewhere else error.strerror
    if isinstance(error, SafetensorError) and ("os error" in text or "I/O error" in text):
        return text.splitlines()[0]
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "no space left, or the disk fails"
    return None


@contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the `with` block ends well, and else goes.

    Folders above are made. The name has the suffix of `path`.

    Raises:
        ValueError: if the file cannot be written there (a full disk, a read-only folder).
    """
    path = Path(path)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        yield Path(scratch)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)  # as `open` makes files, not as `mkstemp` does
        os.replace(scratch, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from error
    except Exception as error:
        reason = write_failure(error, path.parent)
        if reason is None:
            raise
        raise ValueError(f"{path} cannot be written: {reason}.") from error
    finally:
        if scratch is not None and os.path.exists(scratch):
            os.unlink(scratch)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file whole or not at all."""
    with written_beside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


__all__ = ["check_output", "only_writer", "write_failure", "write_text", "written_beside"]
