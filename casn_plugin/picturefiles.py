"""Picture files: read upright in 8-bit RGB, or refused by name; of every mode, depth and format."""

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

_ORIENTATION, _BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 0x0112, 258, 262, 1
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # what torchreid's reader makes white
# Pillow's others run a program, have no known range of values, or do not tell that they are cut
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP",
)  # fmt: skip
"""The formats that are read, as Pillow names them."""


def read_picture(image: PIL.Image.Image | str | os.PathLike[str]) -> PIL.Image.Image:
    """Returns a picture or a picture file upright in 8-bit RGB; transparency is left out.

    16 bits a channel become 8.

    Raises:
        OSError: with an `errno`, what could not be read, which says nothing of its content: there
            is no such file, or no regular one (a FIFO, say), it is forbidden or too large, too
            many are open. Without: a file that is no picture, one of a rare format, or a damaged
            one.
        ValueError: values whose range is not known: floats, or more or other than 8 or 16 bits.

    Example:
        >>> read_picture(PIL.Image.new("CMYK", (4, 8))).mode
        'RGB'
    """
    name = "the picture" if isinstance(image, PIL.Image.Image) else os.fspath(image)
    try:
        if isinstance(image, PIL.Image.Image):
            return _in_rgb(image)
        with _opened(name) as picture:
            return _in_rgb(picture)
    except _DepthError as error:
        raise ValueError(f"{name} has no known range of values: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise OSError(f"{name} can't be read as a picture: it is of no format known") from error
    except (MemoryError, PIL.Image.DecompressionBombError) as error:  # of this process, now
        raise OSError(errno.ENOMEM, str(error) or os.strerror(errno.ENOMEM), name) from error
    except Exception as error:  # every format fails in its own way
        # EINVAL: where a damaged file says that the next part is, there is no place
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(error.errno, error.strerror, name) from error
        raise OSError(f"{name} can't be read as a picture: {error}") from error


def check_pictures(paths: Iterable[str], *, progress: bool = False) -> None:
    """Reads every picture once, so that a damaged one is found before hours are spent.

    What torchreid's own reader would read wrongly in silence is found too: 16 bits a channel, and
    pictures that EXIF says are to be turned.

    Args:
        paths: of the pictures.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: pictures that are missing or can't be read; the first ones are named.

    Example:
        >>> check_pictures([])
    """

    def damage(path: str) -> str | None:
        try:
            with _opened(path) as picture:
                if picture.mode in (*_DEEP, "F"):
                    return f"{path} (mode {picture.mode}, which torchreid's reader turns white)"
                if picture.getexif().get(_ORIENTATION, 1) != 1:
                    return (
                        f"{path} (to be turned upright by EXIF, which torchreid's reader does not)"
                    )
                picture.convert("RGB")
        except Exception as error:  # every format fails in its own way
            return f"{path} ({error})"
        return None

    listed = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        found = tqdm(
            pool.map(damage, listed), "Checking pictures", len(listed), unit="img", leave=False,
            disable=None if progress else True,
        )  # fmt: skip
        damaged = [each for each in found if each is not None]
    if damaged:
        shown = "; ".join(damaged[:5]) + (" ..." if len(damaged) > 5 else "")
        raise ValueError(f"{len(damaged)} of {len(listed)} pictures can't be read: {shown}")


class _DepthError(ValueError):
    """Values whose range is not known."""


@contextmanager
def _opened(path: str) -> Iterator[PIL.Image.Image]:
    """Yields a picture file, not read yet."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO waits for its other end
        raise OSError(errno.ENXIO, "expected a regular file", path)
    # not by its path: Pillow would map some TIFF files into memory, and not turn them upright
    with open(path, "rb") as file:
        content = _Content(file)
        try:
            with PIL.Image.open(content) as picture:  # type: ignore[arg-type]
                if picture.format not in FORMATS:
                    raise OSError(f"expected one of {', '.join(FORMATS)}, got {picture.format}")
                yield picture
        finally:
            if content.error is not None:
                raise content.error


class _Content(io.BufferedIOBase):
    """An open file; `error` is why it could not be read, which decoders take for damage or omit."""

    error: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._file.read(-1 if size is None else size)
        except OSError as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)


def _in_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Returns a picture of any mode and depth upright in 8-bit RGB; transparency is left out."""
    expected = "expected 8 or 16 bits a channel, got"
    if picture.mode == "F":
        raise _DepthError(f"{expected} mode 'F'")
    if picture.mode in _DEEP and picture.format == "TIFF":
        tags: Any = getattr(picture, "tag_v2", {})
        bits, kind = tags.get(_BITS), tags.get(_PHOTOMETRIC)
        if picture.mode == "I" or bits not in ((16,), 16) or kind != _BLACK_IS_ZERO:
            raise _DepthError(f"{expected} a TIFF of {bits} bits, photometric {kind}")
    upright = PIL.ImageOps.exif_transpose(picture)
    if upright.mode in _DEEP:
        values = np.asarray(upright, dtype=np.int64)
        least, most = values.min(initial=0), values.max(initial=0)
        if least < 0 or most > 65535:
            raise _DepthError(f"{expected} values from {least} to {most}")
        if upright.mode == "I" and 0 < most < 256:
            raise _DepthError(f"16 bits or 8? got mode 'I' and no value above {most}")
        upright = PIL.Image.fromarray((values / 257).round().astype(np.uint8))
    return upright.convert("RGB")
