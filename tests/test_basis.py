"""The attention basis: which form a head has, and each form against the Jacobian in full."""

import pytest
import torch
from torch import nn

from casn_plugin.basis import Form, encode_as, encode_head, form_of
from casn_plugin.encoding import part_embedding

CHANNELS = 8


def test_the_jacobian_stops_at_the_pooled_vector(monkeypatch):
    """Where the head takes the mean of the map, no product goes back to the map itself."""
    activations = torch.rand(3, CHANNELS, 7, 3, dtype=torch.float64, requires_grad=True)
    pooled_map = activations.mean((2, 3), keepdim=True)
    seen, grad = [], torch.autograd.grad

    def recorded(outputs, inputs, *args, **kwargs):
        seen.append(inputs)
        return grad(outputs, inputs, *args, **kwargs)

    for dim in (5, 20):  # fewer and more features than channels
        torch.manual_seed(dim)
        layers = nn.Sequential(nn.Linear(CHANNELS, dim), nn.Tanh()).double()
        features = layers(pooled_map.flatten(1))
        slow = encode_head(features, activations)
        seen.clear()
        monkeypatch.setattr(torch.autograd, "grad", recorded)
        fast = encode_head(features, activations, pooled_map)
        monkeypatch.undo()
        assert sum(source is activations for source in seen) == 1  # the probe
        assert sum(source is pooled_map for source in seen) >= 2
        torch.testing.assert_close(fast.basis, slow.basis, rtol=0, atol=1e-14)


def heads():
    """Heads of every form, with the form that is to be found."""
    torch.manual_seed(0)
    narrow, wide = (nn.Sequential(nn.Linear(CHANNELS, dim), nn.Tanh()).double() for dim in (5, 20))
    return {
        "mean": (Form("mean"), lambda a, mean: mean.flatten(1)),
        "parts": (Form("parts"), lambda a, mean: part_embedding(a, 3)),
        "narrow": (Form("features", True), lambda a, mean: narrow(mean.flatten(1))),
        "wide": (Form("channels", True), lambda a, mean: wide(mean.flatten(1))),
        "largest": (Form("features"), lambda a, mean: a.amax((2, 3))),
        "both": (Form("channels"), lambda a, mean: wide(mean.flatten(1) + a.amax((2, 3)))),
    }


@pytest.mark.parametrize("name", heads())
def test_each_form_is_found_and_equals_the_jacobian(name):
    expected, head = heads()[name]
    activations = torch.rand(3, CHANNELS, 7, 3, dtype=torch.float64, requires_grad=True)
    mean = activations.mean((2, 3), keepdim=True)
    features = head(activations, mean)
    form = form_of(features, activations, mean)
    assert form == expected
    encoding = encode_as(form, features, activations, mean, chunk=3)
    assert torch.equal(encode_head(features, activations, mean, chunk=3).maps, encoding.maps)
    if form.head == "parts":
        assert torch.equal(encoding.activations, activations)
        return
    for d in range(features.shape[1]):
        (gradient,) = torch.autograd.grad(features[:, d].sum(), activations, retain_graph=True)
        plain = (gradient.mean((2, 3), keepdim=True) * activations).sum(1)
        torch.testing.assert_close(encoding.basis[:, d], plain.detach(), rtol=0, atol=1e-14)


def test_a_head_without_second_derivative_goes_by_features(monkeypatch):
    activations = torch.rand(2, CHANNELS, 4, 3, requires_grad=True)
    layers = nn.Sequential(nn.Linear(CHANNELS, 20), nn.Tanh())
    features = layers(activations.amax((2, 3)))
    expected = encode_as(Form("features"), features, activations)
    grad = torch.autograd.grad

    def once(*args, create_graph=False, **kwargs):
        if create_graph:
            raise RuntimeError("derivative is not implemented")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", once)
    assert torch.equal(encode_head(features, activations).basis, expected.basis)


def test_features_of_something_else_are_refused():
    with pytest.raises(ValueError, match="do not depend on the activations"):
        encode_head(torch.rand(2, CHANNELS), torch.rand(2, CHANNELS, 5, 3))
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        encode_head(torch.rand(0, CHANNELS), torch.rand(0, CHANNELS, 5, 3))
