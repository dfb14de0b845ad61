"""What public functions are given, checked at their doors: one check for each kind of thing.

Types, shapes and ranges alone, which cost next to nothing; values are read by :func:`check_finite`
and :func:`check_matrix` only, where a figure of merit or a file is made of them.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Settings = TypeVar("Settings")

# dimensions of which there is always something, where there may be no image and no pair
_FILLED = {"height", "width", "dim", "channels", "rows", "columns", "classes"}


def check_tensor(name: str, value: Any, dims: str, *, floating: bool = True) -> Tensor:
    """Returns a tensor of so many dimensions.

    Args:
        name: what it is called in errors.
        value: what is to be one.
        dims: names of its dimensions; "*" in front stands for any number of them. A number is
            the size that a dimension must have.
        floating: of a float dtype; else of an integer one.

    Raises:
        TypeError: no tensor, or one of another kind of dtype, or a sparse one.
        ValueError: another number of dimensions, or another size; a height, width, dim or the
            like of 0.

    Example:
        >>> check_tensor("maps", torch.rand(2, 6, 3), "*batch height width").shape
        torch.Size([2, 6, 3])
    """
    kind = "a float tensor" if floating else "a tensor of integers"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    if value.is_floating_point() != floating or value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a tensor of layout {value.layout}")
    wanted = dims.split()
    rest = wanted[1:] if wanted and wanted[0].startswith("*") else wanted
    sizes = value.shape[len(value.shape) - len(rest) :]
    enough = value.ndim == len(rest) if rest is wanted else value.ndim >= len(rest)
    if not enough or any(
        size != int(dim) if dim.isdigit() else dim in _FILLED and not size
        for dim, size in zip(rest, sizes, strict=False)
    ):
        shape = ", ".join(wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(
            f"{name} must be of shape ({shape}), none but the first 0, got {tuple(value.shape)}"
            if enough and 0 in sizes
            else f"{name} must be of shape ({shape}), got {tuple(value.shape)}"
        )
    return value


def within(numbers: Tensor, length: int) -> bool:
    """Returns whether all integers lie in [0, length); the device is asked once.

    Example:
        >>> within(torch.tensor([0, 4]), 5), within(torch.tensor([-1]), 5), within(torch.ones(0), 5)
        (True, False, True)
    """
    if not numbers.numel():
        return True
    least, most = torch.stack(numbers.aminmax()).tolist()
    return bool(least >= 0 and most < length)


def check_same(name: str, value: Any, shape: torch.Size) -> Tensor:
    """Returns whether each pair shows one identity: a bool tensor of the shape of the pairs.

    Raises:
        TypeError: no tensor of bool.
        ValueError: another shape.

    Example:
        >>> check_same("same", torch.tensor([True, False]), torch.Size([2]))
        tensor([ True, False])
    """
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool tensor, got {came}")
    if value.shape != shape or value.layout != torch.strided:
        raise ValueError(
            f"the pairs and {name}, dense, must be of one shape, got {tuple(shape)} and "
            f"{tuple(value.shape)}"
        )
    return value


def check_lengths(**values: Any) -> int:
    """Returns the length that all have; those that are None are not looked at.

    Raises:
        TypeError: one of them has no length, such as a tensor of no dimension.
        ValueError: they are of unlike lengths.

    Example:
        >>> check_lengths(features=torch.rand(3, 4), pids=[1, 2, 3], camids=None)
        3
    """
    lengths: dict[str, int] = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            lengths[name] = len(value)
        except TypeError as error:
            raise TypeError(
                f"{name} must be several, one an image, got {type(value).__name__}: {error}"
            ) from error
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{' and '.join(lengths)} must be of one length, got "
            + " and ".join(map(str, lengths.values()))
        )
    return next(iter(lengths.values()), 0)


def check_names(name: str, value: Any, length: int | None = None) -> list[str]:
    """Returns names of images as text.

    Args:
        name: what they are called in errors.
        value: a list of text or of paths, one an image.
        length: so many are expected.

    Raises:
        TypeError: no list, such as one text alone, or something else in it.
        ValueError: another number of them.

    Example:
        >>> check_names("names", ["a.jpg", "b.jpg"], 2)
        ['a.jpg', 'b.jpg']
    """
    one = isinstance(value, str | bytes | Mapping | Set) or getattr(value, "ndim", 1) != 1
    if one or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of text, one an image, got {value!r:.80}")
    listed = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
    for each in listed:
        if not isinstance(each, str):
            raise TypeError(f"{name} must be text, one an image, got {type(each).__name__} in them")
    if length not in (None, len(listed)):
        raise ValueError(f"{name} must be {length}, one an image, got {len(listed)}")
    return [str(each) for each in listed]  # NumPy's, too


def check_images(imgs: Any, name: str = "imgs") -> Tensor:
    """Returns a batch of images: (B, 3, rows, columns), float, at least one.

    Raises:
        TypeError: no tensor, or no float tensor.
        ValueError: another shape, or no image.

    Example:
        >>> check_images(torch.rand(2, 3, 8, 4)).shape
        torch.Size([2, 3, 8, 4])
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # sizes are tensors
        return imgs  # type: ignore[no-any-return]
    if isinstance(imgs, Tensor) and imgs.ndim == 4 and not imgs.numel():
        raise ValueError(f"{name} must hold at least one image, got {tuple(imgs.shape)}")
    check_tensor(name, imgs, "batch 3 rows columns")
    return imgs  # type: ignore[no-any-return]


def check_share(name: str, value: Any) -> Any:
    """Returns a share of a map's maximum, such as t, that something must exceed: in [0, 1).

    Raises:
        TypeError: no number.
        ValueError: it lies outside.

    Example:
        >>> check_share("row_threshold", 0.2)
        0.2
    """
    if not 0 <= _number(name, value) < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return value


def check_fraction(name: str, value: Any) -> Any:
    """Returns a part of a whole: in [0, 1].

    Raises:
        TypeError: no number.
        ValueError: it lies outside.

    Example:
        >>> check_fraction("original_weight", 1)
        1
    """
    if not 0 <= _number(name, value) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return value


def check_weight(name: str, value: Any) -> Any:
    """Returns a weight: >= 0 and finite.

    Raises:
        TypeError: no number.
        ValueError: it is negative, NaN or infinite.

    Example:
        >>> check_weight("lambda_ia", 0.5)
        0.5
    """
    if not 0 <= _number(name, value) < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    return value


def check_number(name: str, value: Any) -> float:
    """Returns a finite number, as Python has it.

    Raises:
        TypeError: no number.
        ValueError: it is NaN or infinite.

    Example:
        >>> check_number("mean", torch.tensor(-0.5))
        -0.5
    """
    if not math.isfinite(number := _number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Returns True or False, as Python has them.

    Raises:
        TypeError: neither of them.

    Example:
        >>> check_flag("flip", True)
        True
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r:.80}")
    return bool(value)


def check_kind(name: str, value: Any, *kinds: type) -> Any:
    """Returns an object of one of some kinds.

    Raises:
        TypeError: it is of another.

    Example:
        >>> check_kind("title", "Report", str)
        'Report'
    """
    if not isinstance(value, kinds):
        words = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be a {words}, got {type(value).__name__}")
    return value


def check_settings(name: str, value: Any, kind: type[Settings]) -> Settings:
    """Returns settings of a kind: those given, or its defaults where None is.

    Raises:
        TypeError: settings of another kind.

    Example:
        >>> check_settings("sizes", None, dict)
        {}
    """
    if value is None:
        return kind()
    settings: Settings = check_kind(name, value, kind)
    return settings


def check_count(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> Any:
    """Returns a whole number, at least the least and at most the most.

    Raises:
        TypeError: no integer.
        ValueError: it is less, or more.

    Example:
        >>> check_count("topk", 10)
        10
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        bound = f">= {least}" if least == 0 else f"at least {least}"
        raise ValueError(f"{name} must be {bound}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


def check_seed(seed: Any) -> int:
    """Returns the seed of what is drawn at random: a whole number from 0 to 2**63 - 1.

    Raises:
        TypeError: no integer.
        ValueError: it lies outside.

    Example:
        >>> check_seed(7)
        7
    """
    return int(check_count("seed", seed, least=0, most=2**63 - 1))


def check_ranks(ranks: Any) -> Any:
    """Returns ranks of a CMC: one whole number or more, each at least 1.

    Raises:
        TypeError: something else than several, or ranks that are no integers.
        ValueError: no rank, or one below 1.

    Example:
        >>> check_ranks([1, 5, 10])
        [1, 5, 10]
    """
    if isinstance(ranks, str | bytes) or not hasattr(ranks, "__len__"):
        raise TypeError(f"ranks must be several, such as [1, 5, 10], got {ranks!r:.80}")
    if not len(ranks):
        raise ValueError(f"ranks must be one or more, such as [1, 5, 10], got {ranks!r}")
    for rank in ranks:
        check_count(f"each of the ranks {ranks!r:.80}", rank)
    return ranks


def check_size(name: str, value: Any) -> tuple[int, int]:
    """Returns the rows and columns of a picture: two integers of Python's, from 1 to 65,535.

    Raises:
        TypeError: no two integers.
        ValueError: one of them is less than 1, or more than 65,535.

    Example:
        >>> check_size("size", [256, 128])
        (256, 128)
    """
    listed = value.tolist() if hasattr(value, "tolist") else value  # of an array or a tensor
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes) or len(listed) != 2:
        raise TypeError(f"{name} must be (rows, columns), got {value!r}")
    rows, columns = (
        index(check_count(f"{what} of {name}", each, most=65535))
        for what, each in zip(("rows", "columns"), listed, strict=True)
    )
    return rows, columns


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Returns one of some choices.

    Raises:
        ValueError: it is none.

    Example:
        >>> check_choice("score", "logit", ("logit", "probability"))
        'logit'
    """
    if value not in choices:
        listed = [repr(choice) for choice in choices]
        words = f"{', '.join(listed[:-1])} or {listed[-1]}" if len(listed) > 1 else listed[0]
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return value


def check_finite(name: str, values: Tensor) -> Tensor:
    """Returns values none of which is NaN; infinity is allowed.

    Raises:
        ValueError: some are NaN.

    Example:
        >>> check_finite("scores", torch.tensor([1.0, torch.inf]))
        tensor([1., inf])
    """
    if values.numel() and bool(values.detach().amin().isnan()):  # NaN is the least value of all
        number = int(values.isnan().sum())
        raise ValueError(f"{name} must not be NaN, but {number} of {values.numel()} are")
    return values


def check_matrix(name: str, distmat: Any) -> Tensor:
    """Returns a (queries, galleries) float matrix without NaN.

    Raises:
        TypeError: no float tensor.
        ValueError: another shape, or NaN in it.

    Example:
        >>> check_matrix("distmat", torch.zeros(1, 2))
        tensor([[0., 0.]])
    """
    return check_finite(name, check_tensor(name, distmat, "queries galleries"))


def _number(name: str, value: Any) -> float:
    """Returns a number, or raises TypeError."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > 2**63:  # of Python alone: no tensor can hold it
        raise ValueError(f"{name} must be finite, got a number of {value.bit_length()} bits")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several
        raise TypeError(f"{name} must be one number: {error}") from error
