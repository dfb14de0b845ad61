"""Right calls with one argument gone wrong: the outcome is a sensible result or a clear refusal."""

import dataclasses
import random
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stores import engines, stores
from subjects import cases
from torch import Tensor, nn
from tqdm import tqdm

import casn_plugin

NAN, INF = float("nan"), float("inf")
PACKAGE = str(Path(casn_plugin.__file__).parent)
ANYTHING = (
    None, "text", "", -1, 0, 1.5, NAN, [], {}, (), True, object(), b"bytes", [None], ["a", "b"],
)  # fmt: skip
ALLOWED = (ValueError, TypeError, OSError)
LOOKUPS = {
    name: (IndexError,)
    for name in (
        "GalleryIndex[rows]",
        "GalleryIndex.features_of",
        "GalleryIndex.remove",
        "EncodedAgain[rows]",
        "ranks of queries",
    )
}
"""Who looks for a row says so as sequences do."""
NAN_IS_TOLD = {
    "evaluate_rank",
    "ranked_lists",
    "retrieve",
    "attention_quality",
    "attention_consistency",
    "verification_auc",
}
"""NaN in these results says that there is nothing to measure."""


def wrong(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Returns what was done to a value, and what has become of it."""
    if rng.random() < 0.25:
        other = rng.choice(ANYTHING)
        return repr(other)[:40], other
    if isinstance(value, Tensor):
        return _wrong_tensor(value, rng)
    if isinstance(value, np.ndarray):
        how, tensor = _wrong_tensor(torch.from_numpy(value), rng)
        return how, tensor.numpy() if isinstance(tensor, Tensor) else tensor
    if isinstance(value, casn_plugin.Encoding):
        return _wrong_encoding(value, rng)
    if isinstance(value, bool | int | float):
        other = rng.choice((NAN, INF, -INF, -1, -0.5, 0, 1, 2, 1e30, 10**30, 0.5, "1", True, None))
        return repr(other), other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        field = rng.choice(value._fields)
        how, part = wrong(getattr(value, field), rng)
        return f"{field}: {how}", value._replace(**{field: part})
    if isinstance(value, tuple | list) and value:
        return _wrong_sequence(value, rng)
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        if rng.random() < 0.3:
            return f"without {name}", {key: each for key, each in value.items() if key != name}
        how, part = wrong(value[name], rng)
        return f"{name}: {how}", {**value, name: part}
    if isinstance(value, nn.Module):
        return "another network", nn.Linear(2, 2)
    other = rng.choice(ANYTHING)
    return repr(other)[:40], other


def _wrong_tensor(value: Tensor, rng: random.Random) -> tuple[str, Any]:
    def filled(number: float) -> Tensor:
        copied = value.detach().clone()
        if copied.is_floating_point() and copied.numel():
            copied.view(-1)[rng.randrange(copied.numel())] = number
        return copied.requires_grad_(value.requires_grad)

    detached = value.detach()
    ways = {
        "one NaN": lambda: filled(NAN), "one inf": lambda: filled(INF),
        "one huge": lambda: filled(3e38), "negative": lambda: -value,
        "empty": lambda: value[:0], "one row less": lambda: value[:-1],
        "first of it": lambda: value[0] if value.ndim else value,
        "one dimension more": lambda: value[None], "all zero": lambda: torch.zeros_like(value),
        "half": value.half, "bfloat16": value.bfloat16, "double": value.double,
        "uint8": lambda: detached.nan_to_num().to(torch.uint8), "long": lambda: detached.long(),
        "bool": lambda: detached.bool(), "complex": lambda: value.to(torch.complex64),
        "numpy": lambda: detached.numpy(), "list": detached.tolist,
        "last dimension cut": lambda: value[..., :1], "no columns": lambda: value[..., :0],
        "transposed": lambda: value.transpose(0, -1) if value.ndim else value,
        "sparse": detached.to_sparse,
    }  # fmt: skip
    how = rng.choice(list(ways))
    return how, ways[how]()


def _wrong_encoding(value: casn_plugin.Encoding, rng: random.Random) -> tuple[str, Any]:
    nan = value.maps.clone()
    nan[0, 0, 0, 0] = NAN
    ways = {
        "no images": lambda: value[:0], "one image": lambda: value[:1],
        "NaN maps": lambda: casn_plugin.Encoding(value.features, nan),
        "NaN features": lambda: casn_plugin.Encoding(value.features * NAN, value.basis),
        "half": lambda: value.to(torch.float16), "double": lambda: value.to(torch.float64),
        "features": lambda: value.features,
        "smaller maps": lambda: casn_plugin.Encoding(value.features, value.maps[:, :, :2]),
        "activations": lambda: casn_plugin.Encoding(value.features, activations=value.maps),
        "fewer features": lambda: casn_plugin.Encoding(value.features[:, :3], value.maps[:, :3]),
    }  # fmt: skip
    how = rng.choice(list(ways))
    return how, ways[how]()


def _wrong_sequence(value: Sequence[Any], rng: random.Random) -> tuple[str, Any]:
    kind = type(value)
    row = rng.randrange(len(value))
    how, part = wrong(value[row], rng)
    numbers = all(isinstance(each, int | float) for each in value)
    ways = {
        "empty": kind(), "one less": value[:-1], "one more": kind([*value, value[-1]]),
        f"[{row}] {how}": kind([*value[:row], part, *value[row + 1 :]]),
        "array": np.array(value) if numbers else part, "set": part,
        "floats": [each + 0.5 for each in value] if numbers else part,
        "strings": [str(each) for each in value], "nested": [value],
    }  # fmt: skip
    way = rng.choice(list(ways))
    return way, ways[way]


def numbers_of(result: Any) -> Iterator[Tensor]:
    """Yields all numbers of a result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, float | np.ndarray) and np.asarray(result).dtype.kind == "f":
        yield torch.as_tensor(result)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            yield from numbers_of(getattr(result, field.name))
    elif isinstance(result, dict):
        yield from (each for value in result.values() for each in numbers_of(value))
    elif isinstance(result, tuple | list):
        yield from (each for value in result for each in numbers_of(value))


def is_bad(value: Any) -> bool:
    """Returns whether something that was given is not finite, or overflows where it is summed."""
    return has_nan(value) or any(
        each.is_floating_point() and bool((each.detach().abs() > 1e30).any())
        for each in numbers_of(value)
    )


def has_nan(value: Any) -> bool:
    """Returns whether there is NaN anywhere in a result."""
    return any(
        each.is_floating_point() and each.device.type == "cpu" and bool(each.isnan().any())
        for each in numbers_of(value)
    )


def verdict(name: str, call: Any, given: dict[str, Any], argument: str) -> str | None:
    """Returns what is wrong with the outcome of a call, if anything."""
    try:
        result = call(**given)
    except (*ALLOWED, *LOOKUPS.get(name, ())) as error:
        if isinstance(error, OSError) and error.filename is not None:
            return None  # no such file, by name
        raised = traceback.extract_tb(error.__traceback__)[-1]
        if not raised.filename.startswith(PACKAGE):
            where = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__))
                 if f.filename.startswith(PACKAGE)), raised,
            )  # fmt: skip
            if where is raised and "unexpected keyword" in str(error):
                return None
            return (
                f"deep {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: "
                f"{str(error)[:90]}"
            )
        return None if str(error).strip() else "an error without words"
    except Exception as error:
        where = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)
        ]
        at = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "?"
        return f"raw {type(error).__name__} at {at}: {str(error)[:90]}"
    if has_nan(result) and name not in NAN_IS_TOLD and not is_bad(given[argument]):
        return "NaN in the result, none was given"
    return None


def fuzz(number: int, seed: int, only: str = "") -> tuple[dict[str, int], Counter[str]]:
    """Returns how many calls were made and went wrong, and what was found how often."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    folder = tempfile.TemporaryDirectory(prefix="casn-fuzz-")
    every = cases() | stores() | engines(Path(folder.name))
    subjects = {name: case for name, case in every.items() if only in name}
    for call, given in subjects.values():
        call(**given)  # the right call works
    found: Counter[str] = Counter()
    names = list(subjects)
    for turn in tqdm(range(number), desc="arguments", disable=None):
        name = names[turn % len(names)]
        call, given = subjects[name]
        argument = rng.choice(list(given))
        try:
            how, value = wrong(given[argument], rng)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):  # a change that this value can't have
            continue
        said = verdict(name, call, {**given, argument: value}, argument)
        if said:
            found[f"{name}({argument} = {how}): {said}"] += 1
    raw = sum(count for text, count in found.items() if ": raw " in text)
    deep = sum(count for text, count in found.items() if ": deep " in text)
    figures = {
        "calls": number, "functions": len(subjects), "raw errors": raw, "errors of others": deep,
        "silent": sum(found.values()) - raw - deep,
    }  # fmt: skip
    return figures, found


if __name__ == "__main__":
    import sys

    totals, findings = fuzz(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    for text, count in sorted(findings.items()):
        print(count, text)
    print(totals)
