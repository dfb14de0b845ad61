"""The attention basis: how features depend on the map, in closed form where there is one.

The Siamese attention of a pair depends on the pair through the indicator α alone (Eq. 4), and
linearly: with P the image's pooled Jacobian GAP(∂f/∂A), its map is ReLU(Bᵀα), where the
attention basis B = PᵀA is computed once per image.
"""

import contextlib
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from casn_plugin.doors import check_count, check_lengths, check_tensor
from casn_plugin.encoding import Encoding, part_embedding, part_scales


class Form(NamedTuple):
    """How the basis of a head is computed, as :func:`form_of` finds it.

    Attributes:
        head: "mean": global average pooling, B = A / HW; "parts": normalised parts (PCB), A is
            kept; "features" or "channels": D or C products with the head's Jacobian.
        from_pooled: A goes into the head through its mean alone: the products stop there.
    """

    head: Literal["mean", "parts", "features", "channels"]
    from_pooled: bool = False


def encode_head(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    pooled: Tensor | None = None,
    *,
    chunk: int = 32,
) -> Encoding:
    """Returns the encoding of images from their features and maps, still joined by a graph.

    Exact for any head in eval mode: see :func:`form_of`.

    Args:
        features: f, computed row by row from `activations` with gradients enabled.
        activations: the map A.
        pooled: (images, channels, 1, 1), where A goes into the head through its mean alone: the
            mean, a tensor of the same graph. The products then stop there, which is faster.
        chunk: products with the Jacobian at a time, where they are needed.

    Raises:
        TypeError: features or activations that are no float tensors.
        ValueError: no image, unlike numbers, other shapes, or features that do not depend on the
            activations.

    Example:
        >>> a = torch.rand(2, 8, 6, 3, requires_grad=True)
        >>> encode_head(a.mean((2, 3)), a).basis.shape
        torch.Size([2, 8, 6, 3])
    """
    check_count("chunk", chunk)
    form = form_of(features, activations, pooled)
    if form.head == "channels":
        with contextlib.suppress(RuntimeError):  # HACNN's grid_sample has no second derivative
            return encode_as(form, features, activations, pooled, chunk=chunk)
        form = form._replace(head="features")
    return encode_as(form, features, activations, pooled, chunk=chunk)


def form_of(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    pooled: Tensor | None = None,
) -> Form:
    """Returns how the basis of a head is computed: which of the closed forms holds, if any.

    One random vector-Jacobian product tells. Arguments and errors as of :func:`encode_head`.

    Example:
        >>> a = torch.rand(2, 8, 6, 3, requires_grad=True)
        >>> form_of(a.mean((2, 3)), a).head, form_of(a.amax((2, 3)), a).head
        ('mean', 'features')
    """
    check_tensor("features", features, "images dim")
    check_tensor("activations", activations, "images channels height width")
    if not check_lengths(features=features, activations=activations):
        raise ValueError("expected at least one image, got none")
    maps, values = activations.detach(), features.detach()
    generator = torch.Generator(features.device).manual_seed(0)
    probe = torch.randn(
        features.shape, generator=generator, device=features.device, dtype=features.dtype
    )
    gradients = None
    if features.requires_grad and activations.requires_grad:
        (gradients,) = torch.autograd.grad(
            features, activations, probe, retain_graph=True, allow_unused=True
        )
    if gradients is None:
        raise ValueError(
            "the features do not depend on the activations: expected features computed, with "
            "gradients enabled, from the very tensor that is given as activations"
        )
    channels, height, width = maps.shape[1:]
    means = maps.mean((2, 3))
    if _close(values, means) and _close(
        gradients, (probe / (height * width))[:, :, None, None].expand_as(gradients)
    ):
        return Form("mean")
    parts, remainder = divmod(values.shape[1], channels)
    if not remainder and _close(values, part_embedding(maps, parts)):
        weights = _part_weights(values, maps, probe[:, None])[:, 0]
        if _close(gradients.mean((2, 3)), weights):
            return Form("parts")
    from_pooled = False
    if pooled is not None and pooled.requires_grad and _close(pooled.flatten(1), means):
        (pulled,) = torch.autograd.grad(
            features, pooled, probe, retain_graph=True, allow_unused=True
        )
        from_pooled = pulled is not None and _close(
            gradients, (pulled / (height * width)).expand_as(gradients)
        )
    return Form("channels" if channels < values.shape[1] else "features", from_pooled)


def encode_as(
    form: Form,
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    pooled: Tensor | None = None,
    *,
    chunk: int = 32,
) -> Encoding:
    """Returns the encoding of images whose head has a form: no value is looked at.

    Args:
        form: as :func:`form_of` gives it for any images of the same network.
        features: as for :func:`encode_head`, as the others.
        activations: likewise.
        pooled: likewise.
        chunk: likewise.

    Example:
        >>> a = torch.rand(2, 8, 6, 3, requires_grad=True)
        >>> encode_as(Form("features"), a.amax((2, 3)), a).basis.shape
        torch.Size([2, 8, 6, 3])
    """
    maps, values = activations.detach(), features.detach()
    pixels = maps.shape[2] * maps.shape[3]
    if form.head == "parts":
        return Encoding(values, activations=maps.contiguous())
    if form.head == "mean":
        return Encoding(values, basis=(maps / pixels).contiguous())
    source = activations
    if form.from_pooled and pooled is not None:
        source, maps = pooled, maps / pixels
    by = _basis_by_channel if form.head == "channels" else _basis_by_feature
    return Encoding(values, basis=by(features, source, maps, chunk).contiguous())


def _basis_by_feature(features: Tensor, source: Tensor, maps: Tensor, chunk: int) -> Tensor:
    """Returns the attention basis by D products Pᵀ e_d."""
    basis = maps.new_empty(*features.shape, *maps.shape[2:])
    unit = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    for start in range(0, features.shape[1], chunk):
        rows = unit[start : start + chunk, None].expand(-1, len(features), -1)
        (jacobian,) = torch.autograd.grad(
            features, source, rows, retain_graph=True, is_grads_batched=True
        )
        basis[:, start : start + chunk] = torch.einsum(
            "dbc,bchw->bdhw", jacobian.mean((3, 4)), maps
        )
    return basis


def _basis_by_channel(features: Tensor, source: Tensor, maps: Tensor, chunk: int) -> Tensor:
    """Returns the attention basis by C products P e_k instead of D products Pᵀ e_d.

    v ↦ GAP(Jᵀ v) is linear, so differentiating it once more gives the columns of P.
    """
    cotangent = torch.zeros_like(features, requires_grad=True)
    (pulled,) = torch.autograd.grad(features, source, cotangent, create_graph=True)
    pooled = pulled.mean((2, 3))
    unit = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
    basis = maps.new_zeros(*features.shape, *maps.shape[2:])
    for start in range(0, pooled.shape[1], chunk):
        columns = unit[start : start + chunk, None].expand(-1, len(features), -1)
        (jacobian,) = torch.autograd.grad(
            pooled, cotangent, columns, retain_graph=True, is_grads_batched=True
        )
        basis += torch.einsum("cbd,bchw->bdhw", jacobian, maps[:, start : start + chunk])
    return basis


def _part_weights(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    alpha: Float[Tensor, "images others dim"],
) -> Float[Tensor, "images others channels"]:
    """Returns w = GAP(∂(α, f)/∂A) of normalised parts: Σ_p (α_p − f_p (f_p·α_p)) / (‖g_p‖ HW).

    g_p is the pooled part and f_p = g_p / ‖g_p‖.
    """
    channels = activations.shape[1]
    parts = features.shape[1] // channels
    scale = part_scales(activations, parts)
    unit = features.unflatten(1, (channels, parts))
    alpha = alpha.unflatten(2, (channels, parts))
    along = torch.einsum("nocp,ncp->nop", alpha, unit) * scale[:, None]
    return torch.einsum("nocp,np->noc", alpha, scale) - torch.einsum("nop,ncp->noc", along, unit)


def _close(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors agree up to rounding, relative to their largest value."""
    if first.shape != second.shape:
        return False
    tolerance = 100 * torch.finfo(first.dtype).eps
    return bool((first - second).abs().max() <= tolerance * second.abs().max())
