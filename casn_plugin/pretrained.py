"""A trained model in a folder, with all that ranking needs: one safetensors file, no code.

What else is to be known stands in the file's metadata, as JSON: weights and what belongs to them
come into their place in one step, whatever interrupts that.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from casn_plugin.doors import check_choice, check_kind
from casn_plugin.evidence import PairClassifier, Similarity
from casn_plugin.files import replacing
from casn_plugin.heads import Forward
from casn_plugin.layouts import Reshape
from casn_plugin.model import CASN, as_casn
from casn_plugin.packages import needed
from casn_plugin.preprocessing import Preprocessing

FILE = "model.safetensors"
"""The file in the folder."""

_ABOUT, _CHECKSUM = "casn_plugin", "sha256"  # in its metadata
_BUILDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torchreid": ("torchreid", "models.build_model", {"pretrained": False}),
    "timm": ("timm", "create_model", {"pretrained": False}),
    "torchvision": ("torchvision", "models.get_model", {"weights": None}),
}
"""How each library makes a network by its name: no weights are downloaded."""


@dataclass(frozen=True)
class Network:
    """The network of a model, as its library makes it again.

    Attributes:
        library: "torchreid", "timm" or "torchvision".
        name: as that library calls it, such as "osnet_x1_0".
        options: its options, such as num_classes and loss.

    Raises:
        TypeError: a name that is no text, options that are no dictionary.
        ValueError: another library, or options that JSON can't hold.

    Example:
        >>> Network("torchvision", "mobilenet_v2", {"num_classes": 5}).name
        'mobilenet_v2'
    """

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        check_choice("library", self.library, tuple(_BUILDERS))
        check_kind("name", self.name, str)
        check_kind("options", self.options, Mapping)
        if json.loads(_json(dict(self.options))) != dict(self.options):
            raise ValueError(f"options must be plain values, as JSON has them, got {self.options}")

    def build(self) -> nn.Module:
        """Returns the network, with new weights.

        Raises:
            ModuleNotFoundError: its library is not installed.
        """
        module, function, fixed = _BUILDERS[self.library]
        with needed():
            make = attrgetter(function)(importlib.import_module(module))
        return check_kind("the network", make(self.name, **{**self.options, **fixed}), nn.Module)  # type: ignore[no-any-return]


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], network: Network | None
) -> Path:
    """Returns the folder that a trained model was saved in; :func:`from_pretrained` loads it.

    Args:
        model: a CASN, or one in any of PyTorch's wrappers.
        folder: made if need be; a model that is there is replaced in one step, and stays where
            that fails.
        network: how its backbone is made again; None: it is given when the model is loaded.

    Raises:
        TypeError: another model or network, or a pair classifier of another class.
        OSError: a folder or file that can't be written.
    """
    casn, folder = as_casn(model), Path(folder)
    if network is not None:
        check_kind("network", network, Network)
    classifier = casn.pair_classifier
    if not isinstance(classifier, PairClassifier | Similarity):
        raise TypeError(
            "the pair classifier must be a PairClassifier or a Similarity, got "
            f"{type(classifier).__name__}: nothing says how another one is made again"
        )
    state = {name: value.contiguous().clone() for name, value in casn.state_dict().items()}
    trains = isinstance(classifier, PairClassifier)
    hidden = state["pair_classifier.0.weight"].shape[0] if trains else None
    about = {
        "format": 2,
        "network": None if network is None else {**asdict(network), "options": {**network.options}},
        "target_layer": casn.reader.target_layer if casn.reader.at == "output" else None,
        "evidence": "similarity" if hidden is None else "pair classifier",
        "hidden_dim": hidden,
        "flip": casn.flip,
        "preprocessing": asdict(casn.preprocessing),
    }
    data = _packed(state, about)
    with replacing(folder / FILE) as partial:
        partial.write_bytes(data)
    return folder


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    forward: Forward | None = None,
    reshape: Reshape | None = None,
) -> CASN:
    """Returns the model that :func:`save_pretrained` saved, on the CPU in eval mode.

    With its weights come the layer that is tapped, its evidence, `preprocessing` and `flip`.

    Args:
        folder: where it was saved.
        backbone: its network, where the folder does not say how it is made.
        forward: as for :class:`CASN`, where the model was made with one.
        reshape: likewise.

    Raises:
        FileNotFoundError: no model in that folder.
        ModuleNotFoundError: the network's library is not installed.
        ValueError: a file that is damaged, of another format or of no CASN; weights of another
            network; no backbone, where one is needed.
    """
    folder = Path(folder)
    about, state = _read(folder / FILE)
    if backbone is None:
        if about["network"] is None:
            raise ValueError(f"{folder} does not say how its network is made: give it as backbone")
        backbone = Network(**about["network"]).build()
    try:
        prepared = Preprocessing(**{k: tuple(v) for k, v in about["preprocessing"].items()})
    except TypeError as error:
        raise ValueError(f"{folder / FILE}: {error}") from error
    classifier = Similarity() if about["evidence"] == "similarity" else None
    hidden = {} if about["hidden_dim"] is None else {"hidden_dim": about["hidden_dim"]}
    model = CASN(
        backbone, target_layer=about["target_layer"], forward=forward, reshape=reshape,
        pair_classifier=classifier, input_size=prepared.size, **hidden,
    )  # fmt: skip
    model.preprocessing, model.flip = prepared, about["flip"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder} is of another network: {error}") from error
    return model.eval()


def _json(value: Any, **options: Any) -> str:
    """Returns a value as JSON; raises ValueError for what can't be."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected plain values, as JSON has them: {error}") from error


def _packed(state: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """Returns a file of weights, and what is said of them; raises ValueError for what can't be."""
    said = _json(about)
    checksum = _checksum(said, save_tensors(state))
    return bytes(save_tensors(state, {_ABOUT: said, _CHECKSUM: checksum}))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what a file says of its model, and the weights in it.

    Raises:
        ValueError: what we did not write.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "format": (int,), "network": (dict, type(None)), "target_layer": (str, type(None)),
        "evidence": (str,), "hidden_dim": (int, type(None)), "flip": (bool,),
        "preprocessing": (dict,),
    }  # fmt: skip
    data = path.read_bytes()
    try:
        state, (head, _) = load_tensors(data), _halves(data)
        metadata = json.loads(head).get("__metadata__", {})
        about = json.loads(metadata.get(_ABOUT, "null"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    sound = isinstance(about, dict) and about.keys() == kinds.keys() and about["format"] == 2
    if not sound or not all(isinstance(about[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is of no model that save_pretrained saved, or of another version")
    if metadata.get(_CHECKSUM) != _checksum(metadata[_ABOUT], data):
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    network: Any = about["network"]
    if network is not None and network.keys() != {"library", "name", "options"}:
        raise ValueError(f"{path}: network must have library, name and options, got {network}")
    if about["preprocessing"].keys() != {"size", "mean", "std"}:
        raise ValueError(f"{path}: preprocessing must have size, mean and std")
    return about, state


def _checksum(said: str, data: bytes) -> str:
    """Returns the checksum of what is said of a model and of its weights, as a file has them."""
    head, values = _halves(data)
    tensors = {name: each for name, each in json.loads(head).items() if name != "__metadata__"}
    digest = hashlib.sha256(_json([said, tensors], sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


def _halves(data: bytes) -> tuple[bytes, memoryview]:
    """Returns the head of a safetensors file, as JSON, and the values of all tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], memoryview(data)[start:]
