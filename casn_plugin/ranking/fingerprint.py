"""The checksum of a model's weights that an index is bound to: hashed once, as long as they stay.

SHA-256 of all weights takes longer than a forward pass. So it is kept with what tells, at a ninth
of that, whether they are still the same: which tensors they are, how often they were changed in
place, and the sum of their bits.
"""

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from casn_plugin.doors import check_kind
from casn_plugin.evidence import Similarity
from casn_plugin.hooks import unwrapped

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

_known: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Returns a checksum of all weights of a model, of its kind of evidence and of `flip`.

    What a pair classifier's weights were at first is no part of it: nothing is computed from that.

    Weights are hashed again where they may have changed: by an optimizer's step,
    ``load_state_dict``, ``to`` or ``half``, a layer or parameter put in another's place, or a write
    through ``.data``, which PyTorch does not count, but which changes the sum of the bits. What
    goes unnoticed is a write through ``.data`` that leaves that sum of every tensor as it was, such
    as one that swaps two pairs of values.

    Args:
        model: a network, or one in any of PyTorch's wrappers.

    Raises:
        TypeError: no module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> before == fingerprint(layer), len(before)
        (True, 64)
        >>> layer.weight.data[0, 0] += 1
        >>> before == fingerprint(layer)
        False
    """
    network = unwrapped(check_kind("model", model, nn.Module))
    kind = b"flip" if getattr(network, "flip", False) else b""
    if isinstance(getattr(network, "pair_classifier", None), Similarity):
        kind += b"similarity"
    weights = {
        name: value
        for name, value in network.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not name.endswith("pair_classifier.initial")
    }
    with torch.no_grad():
        state = kind, changes(network), _sums([*weights.values()])
        known = _known.get(network)
        if known is None or known[0] != state:
            known = _known[network] = state, _hashed(kind, weights)
    return known[1]


def changes(model: nn.Module) -> list[tuple[Any, ...]]:
    """Returns which tensors a model holds, and how often each was changed in place.

    It takes less than a millisecond, and stays the same after a write through ``.data``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = changes(layer)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> before == changes(layer)
        False
    """
    return [
        (name, id(value), None if value.is_inference() else value._version, value.dtype)
        for name, value in unwrapped(model).state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    ]


def _sums(weights: list[Tensor]) -> list[int]:
    """Returns the sum of the bits of each tensor, taken as integers of up to 64 bits."""
    sums: dict[torch.device, list[Tensor]] = {}
    for value in weights:
        if value.ndim == 4 and value.is_contiguous(
            memory_format=torch.channels_last
        ):  # as it lies in memory, if that is channels last: nothing is copied
            value = value.permute(0, 2, 3, 1)
        flat = value.detach().contiguous().view(-1)
        places = [each * flat.element_size() for each in (flat.storage_offset(), flat.numel())]
        word = next(w for w in _WORDS if not any(place % w.itemsize for place in places))
        sums.setdefault(flat.device, []).append(flat.view(word).sum())
    return [each for some in sums.values() for each in torch.stack(some).tolist()]


def _hashed(kind: bytes, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(kind)
    for name, value in weights.items():
        digest.update(name.encode())
        values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()
