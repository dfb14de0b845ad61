"""Other packages: what to install where one can't be imported, or where it was built for less."""

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python"}


@contextmanager
def needed(extra: str | None = None, *, quiet: str | None = None) -> Iterator[None]:
    """Lets imports inside of it say what to install where they fail.

    Args:
        extra: of this package, that what is imported comes with.
        quiet: warnings that begin so are not shown.

    Raises:
        ModuleNotFoundError: a package that is not installed.
        ImportError: a torchvision that was built for another torch.

    Example:
        >>> with needed("tables"):
        ...     import no_such_package
        Traceback (most recent call last):
        ModuleNotFoundError: this needs no_such_package: pip install 'casn-plugin[tables]'
    """
    try:
        with warnings.catch_warnings():
            if quiet:
                warnings.filterwarnings("ignore", re.escape(quiet))
            yield
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        name = error.name.partition(".")[0]
        what = f"'casn-plugin[{extra}]'" if extra else _DISTRIBUTIONS.get(name, name)
        raise ModuleNotFoundError(
            f"this needs {name}: pip install {what}", name=error.name
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # torch finds the operators of another
        if "torchvision" not in str(error):
            raise
        raise ImportError(
            f"torchvision {_version('torchvision')} does not fit torch {torch.__version__} "
            f"({error}): pip install --upgrade torch torchvision", name="torchvision"
        ) from error  # fmt: skip


def without_gpu() -> str:
    """Returns why PyTorch finds no GPU, as far as that can be told; "" where it finds one.

    Example:
        >>> bool(without_gpu()) != torch.cuda.is_available()
        True
    """
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} was built without GPUs: https://pytorch.org/get-started "
            "says how to install one that was built with them"
        )
    return f"torch {torch.__version__} finds no GPU that it can use"


def check_device(name: str) -> torch.device:
    """Returns a device by its name.

    Raises:
        ValueError: it names none, or a GPU that PyTorch does not find.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected a device such as cpu or cuda, got {name}") from error
    if device.type == "cuda":
        why = without_gpu()
        if not why and (device.index or 0) >= torch.cuda.device_count():
            why = f"there are {torch.cuda.device_count()}"
        if why:
            raise ValueError(f"expected a GPU that is there, got {name}: {why}")
    return device


def warn_of_unused_gpu(wanted: bool = True) -> None:
    """Warns where a GPU is wanted, this machine has NVIDIA's driver, and PyTorch finds none."""
    why = without_gpu() if wanted else ""
    if why and shutil.which("nvidia-smi"):
        warnings.warn(f"the CPU is used, although there is an NVIDIA driver: {why}", stacklevel=3)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of an unknown version"
