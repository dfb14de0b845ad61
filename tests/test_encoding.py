"""What ranking needs of an image: encodings as lists of images, and what is no encoding."""

import pytest
import reference
import torch
from torch import nn

from casn_plugin import Encoding
from casn_plugin.basis import encode_head
from casn_plugin.encoding import part_embedding, with_mirrored
from casn_plugin.ranking import pair_attention

CHANNELS = 8


def test_encodings_select_join_and_check_themselves():
    activations = torch.rand(5, CHANNELS, 7, 3)
    encoding = Encoding(part_embedding(activations, 3), activations=activations)
    assert len(encoding) == 5 and len(encoding[torch.tensor([4, 1])]) == 2
    joined = Encoding.cat([encoding[:2], encoding[2:]])
    torch.testing.assert_close(joined.maps, encoding.maps, rtol=0, atol=0)
    many = encoding[2:3].expand(4)
    assert torch.equal(many.maps, activations[[2, 2, 2, 2]])
    assert torch.equal(many.features, encoding.features[[2, 2, 2, 2]])
    assert many.maps.untyped_storage().data_ptr() == activations.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="the encoding of one image, got 2"):
        encoding[:2].expand(3)
    other = Encoding(torch.rand(2, CHANNELS), basis=torch.rand(2, CHANNELS, 7, 3))
    with pytest.raises(ValueError, match="all with a basis or all with activations"):
        Encoding.cat([encoding, other])
    with pytest.raises(ValueError, match="at least one"):
        Encoding.cat([])
    with pytest.raises(ValueError, match="expected encodings of one kind and size"):
        with_mirrored(encoding, encoding[:2])
    with pytest.raises(ValueError, match="expected encodings of one kind and size"):
        with_mirrored(encoding[:2], other)


def head(name):
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(CHANNELS, 5), nn.Tanh(), nn.Linear(5, 9)).double()
    return {
        "pooled": lambda maps: maps.mean((2, 3)),
        "layers": lambda maps: layers(maps.relu().mean((2, 3))),
        "positions": lambda maps: nn.functional.normalize(maps.flatten(1), dim=1),
        "parts": lambda maps: reference.pcb_embedding(maps, 3),
    }[name]


@pytest.mark.parametrize("name", ["pooled", "layers", "positions", "parts"])
def test_attention_of_the_mean_with_the_mirror_image_is_that_of_autograd(name):
    function = head(name)
    maps, mirrored = (torch.rand(4, CHANNELS, 7, 3).double().requires_grad_() for _ in range(2))
    found = with_mirrored(*(encode_head(function(each), each) for each in (maps, mirrored)))
    alpha = (torch.rand(4, found.features.shape[1]) > 0.5).double()
    # the mean as a function of both maps; of parts, it is taken before they are normalised
    if name == "parts":
        features = function((maps + mirrored.flip(3)) / 2)
    else:
        features = (function(maps) + function(mirrored)) / 2
    torch.testing.assert_close(found.features, features.detach(), rtol=0, atol=1e-13)
    one, other = torch.autograd.grad((alpha * features).sum(), (maps, mirrored))
    expected = (one.mean((2, 3), keepdim=True) * maps).sum(1)
    expected = expected + (other.mean((2, 3), keepdim=True) * mirrored).sum(1).flip(2)
    model = nn.Module()
    model.pair_classifier = Chosen(alpha)
    first, _ = pair_attention(model, found, found)
    torch.testing.assert_close(first, expected.relu().detach(), rtol=0, atol=1e-12)


class Chosen(nn.Module):
    """A pair classifier whose alpha is what one wants: z1 = (2 alpha - 1, f)."""

    def __init__(self, alpha):
        super().__init__()
        self.signs = nn.Parameter(2 * alpha - 1)

    def forward(self, difference):
        z = (self.signs[: len(difference)] * difference).sum(1)
        return torch.stack([-z, z], 1)


def test_bad_input_says_what_was_expected(unchecked):
    with pytest.raises(ValueError, match="either a basis or activations"):
        Encoding(torch.rand(2, 3))
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        Encoding(torch.rand(2, 3), basis=torch.rand(3, 3, 2, 2))
    for sizes in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"got {sizes[0]} features and {sizes[1]} channels"):
            Encoding(torch.rand(2, sizes[0]), basis=torch.rand(2, sizes[1], 6, 3))
    with pytest.raises(ValueError, match="got 8 features and 3 channels"):
        Encoding(torch.rand(2, 8), activations=torch.rand(2, 3, 6, 3))
