"""What ranking needs of an image: the basis of any head, and encodings as lists of images."""

import pytest
import torch
from torch import nn

from casn_plugin import Encoding
from casn_plugin.encoding import encode_head, part_embedding

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


def test_encodings_select_join_and_check_themselves():
    activations = torch.rand(5, CHANNELS, 7, 3, requires_grad=True)
    encoding = encode_head(part_embedding(activations, 3), activations)
    assert len(encoding) == 5 and len(encoding[torch.tensor([4, 1])]) == 2
    joined = Encoding.cat([encoding[:2], encoding[2:]])
    torch.testing.assert_close(joined.maps, encoding.maps, rtol=0, atol=0)
    other = Encoding(torch.rand(2, CHANNELS), basis=torch.rand(2, CHANNELS, 7, 3))
    with pytest.raises(ValueError, match="all with a basis or all with activations"):
        Encoding.cat([encoding, other])
    with pytest.raises(ValueError, match="at least one"):
        Encoding.cat([])


def test_bad_input_says_what_was_expected(unchecked):
    with pytest.raises(ValueError, match="either a basis or activations"):
        Encoding(torch.rand(2, 3))
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        Encoding(torch.rand(2, 3), basis=torch.rand(3, 3, 2, 2))
    with pytest.raises(ValueError, match="do not depend on the activations"):
        encode_head(torch.rand(2, CHANNELS), torch.rand(2, CHANNELS, 5, 3))
    for sizes in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"got {sizes[0]} features and {sizes[1]} channels"):
            Encoding(torch.rand(2, sizes[0]), basis=torch.rand(2, sizes[1], 6, 3))
    with pytest.raises(ValueError, match="got 8 features and 3 channels"):
        Encoding(torch.rand(2, 8), activations=torch.rand(2, 3, 6, 3))
