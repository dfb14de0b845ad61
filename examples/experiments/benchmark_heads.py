"""Heads of backbones with random maps, and ranking by autograd: what the benchmarks compare."""

from collections.abc import Callable
from typing import Any

import torch
from rows import markdown
from torch import Tensor, nn

from casn_plugin import Encoding, PairClassifier
from casn_plugin.attention import attention_distance, row_profiles, siamese_attention
from casn_plugin.basis import encode_head
from casn_plugin.encoding import part_embedding
from casn_plugin.identities import split_pairs

HIDDEN = 512
MARKET = 3368, 19732
"""Queries and gallery images of Market-1501."""


class Head(nn.Module):
    """A head of a backbone and the size of its maps, with a pair classifier: all ranking needs.

    Args:
        size: (C, H, W) of a map.
        dim: of the features.
        function: maps (B, C, H, W) activations to (B, D) features.
        channels: that a map of attention is a sum of, where they are not C.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        dim: int,
        function: Callable[[Tensor], Tensor],
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.size, self.dim, self.function = size, dim, function
        self.channels = channels or size[0]
        self.pair_classifier = PairClassifier(dim, HIDDEN)

    def activations(self, images: int, device: str = "cpu") -> Tensor:
        """Returns random maps that are zero at half of their places."""
        maps = torch.randn(images, *self.size, device=device).relu()
        return maps * torch.rand(images, self.size[0], 1, 1, device=device)

    def encode(self, images: int, device: str = "cpu") -> Encoding:
        """Returns the encoding of random maps, made in portions."""
        parts = []
        for start in range(0, images, 64):
            maps = self.activations(min(64, images - start), device).requires_grad_()
            parts.append(encode_head(self.function(maps), maps))
        return Encoding.cat(parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of a pair: α by one product, and two maps."""
        return 2 * HIDDEN * self.dim + 2 * 2 * self.channels * self.size[1] * self.size[2]


def make_head(name: str) -> Head:
    """Returns the head of a benchmark: global average pooling, PCB's parts, OSNet's two layers."""
    torch.manual_seed(0)
    if name == "GAP":
        return Head((2048, 18, 9), 2048, lambda maps: maps.mean((2, 3)))
    if name == "PCB":
        return Head((2048, 24, 8), 12288, lambda maps: part_embedding(maps, 6))
    layers = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU()).eval()

    def of_osnet(maps: Tensor) -> Tensor:
        features: Tensor = layers.to(maps)(maps.mean((2, 3)))
        return features

    # OSNet's maps of attention are sums over its 512 features, not over the 128 channels
    return Head((128, 16, 8), 512, of_osnet, 512)


def autograd_distances(head: Head, first: Tensor, second: Tensor) -> Tensor:
    """Returns attention distances of pairs of maps by differentiating every pair."""
    maps = torch.stack([first, second], 1).flatten(0, 1).requires_grad_()
    attention = siamese_attention(
        head.pair_classifier, head.function(maps), maps, create_graph=False
    )
    return attention_distance(*split_pairs(row_profiles(attention.detach())))


def table(title: str, header: list[str], rows: list[list[Any]]) -> str:
    """Returns a table in Markdown below its title."""
    return f"### {title}\n\n{markdown(header, rows)}\n"
