"""Encoding without Python: features and attention basis as one plain graph, and as an ONNX file."""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from casn_plugin.basis import encode_as, form_of
from casn_plugin.doors import check_count, check_size
from casn_plugin.encoding import Encoding, with_mirrored
from casn_plugin.files import replacing
from casn_plugin.hooks import place_of
from casn_plugin.model import as_casn
from casn_plugin.packages import needed
from casn_plugin.twins import evaluated

if TYPE_CHECKING:
    from torch.fx import GraphModule


class TracedEncoder(NamedTuple):
    """How a model encodes a batch, as a graph of tensor operations: no hook, no autograd.

    Attributes:
        graph: maps images of the shape of `imgs` to (features, maps).
        imgs: images that it was traced with: what ``torch.export.export(graph, (imgs,))`` needs.
        maps: what the second result is: "basis", or "activations" of normalised parts (PCB).

    Example:
        >>> from casn_plugin import CASN
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs)), input_size=(16, 8))
        >>> traced = traced_encoder(model)
        >>> encoding = traced.encoding(*traced.graph(traced.imgs))
        >>> torch.equal(encoding.maps, model.encode(traced.imgs).maps)
        True
    """

    graph: "GraphModule"
    imgs: Tensor
    maps: Literal["basis", "activations"]

    def encoding(self, features: Tensor, maps: Tensor) -> Encoding:
        """Returns the encoding that ranking takes, of what the graph gives."""
        return Encoding(features, **{self.maps: maps})


def traced_encoder(
    model: nn.Module, *, batch_size: int = 1, size: tuple[int, int] | None = None
) -> TracedEncoder:
    """Returns how a model encodes so many images of one size, traced as a graph.

    The Jacobian of the head is in the graph as plain operations, so whatever runs the graph can
    rank: see :func:`export_onnx`. The model is left as found.

    Args:
        model: a CASN, or one in any of PyTorch's wrappers.
        batch_size: of the images that the graph takes: it takes no other number.
        size: (rows, columns) of the images, by default those of the model's `preprocessing`.

    Raises:
        TypeError: another model, or one in half precision.
        ValueError: `batch_size` below 1.
    """
    casn = as_casn(model)
    rows, columns = check_size("size", casn.preprocessing.size if size is None else size)
    place = place_of(casn)
    noise = torch.randn(
        check_count("batch_size", batch_size), 3, rows, columns,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    imgs = noise.to(*place)
    with evaluated(casn.backbone) as backbone, torch.inference_mode(False):
        form = form_of(*casn.reader.joined(backbone, imgs))

        def encode(imgs: Tensor) -> tuple[Tensor, Tensor]:
            encoding = encode_as(form, *casn.reader.joined(backbone, imgs))
            if casn.flip:
                other = encode_as(form, *casn.reader.joined(backbone, imgs.flip(3)))
                encoding = with_mirrored(encoding, other)
            return encoding.features, encoding.maps

        graph = make_fx(encode)(imgs)
    return TracedEncoder(graph, imgs, "activations" if form.head == "parts" else "basis")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
) -> Path:
    """Returns the path of an ONNX file that encodes images; it is whole or not there.

    Its input is "imgs", its outputs are "features" and "basis" (or "activations", of normalised
    parts): ``Encoding(features, basis=...)`` of them is what ranking takes. The file's metadata
    "casn_plugin" say in JSON how the model's `preprocessing` prepares its images.

    Args:
        model: a CASN, or one in any of PyTorch's wrappers.
        path: of the file, an existing one is replaced.
        batch_size: images that the file's graph takes at a time.

    Raises:
        ModuleNotFoundError: onnx or onnxscript are not installed.
        TypeError: as :func:`traced_encoder`.
        ValueError: likewise.
        OSError: a folder or file that can't be written.
    """
    with needed("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    traced = traced_encoder(model, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        program = torch.onnx.export(
            torch.export.export(traced.graph, (traced.imgs,)), dynamo=True, verbose=False,
            input_names=["imgs"], output_names=["features", traced.maps],
        )  # fmt: skip
    assert program is not None  # for the type checker: dynamo=True gives one
    about = {**asdict(as_casn(model).preprocessing), "maps": traced.maps}
    program.model.metadata_props["casn_plugin"] = json.dumps(about)
    with replacing(path) as partial:
        program.save(partial, external_data=False)
    return Path(path)
