"""What ranking needs of an image: encodings as lists of images, and what is no encoding."""

import pytest
import torch

from casn_plugin import Encoding
from casn_plugin.encoding import part_embedding

CHANNELS = 8


def test_encodings_select_join_and_check_themselves():
    activations = torch.rand(5, CHANNELS, 7, 3)
    encoding = Encoding(part_embedding(activations, 3), activations=activations)
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
    for sizes in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"got {sizes[0]} features and {sizes[1]} channels"):
            Encoding(torch.rand(2, sizes[0]), basis=torch.rand(2, sizes[1], 6, 3))
    with pytest.raises(ValueError, match="got 8 features and 3 channels"):
        Encoding(torch.rand(2, 8), activations=torch.rand(2, 3, 6, 3))
