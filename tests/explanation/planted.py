"""What the explanations are tried on: a model whose attention is known, and people to find."""

import numpy as np
import PIL.Image
import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn

from casn_plugin import CASN

SIZE = (64, 32)


class Detector(nn.Module):
    """A backbone whose first map is where red is, and whose second one where it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 8, 8, bias=False)
        colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]])
        self.features.weight.data = colours[:, :, None, None].expand(2, 3, 8, 8) / 64
        self.classifier = nn.Linear(2, 3)


def detect(backbone: Detector, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = backbone.features(imgs).relu().mean((2, 3))
    return backbone.classifier(features), features


def detecting_casn() -> CASN:
    """A CASN that says "same" of whatever is redder in the first image."""
    pair_classifier = nn.Linear(2, 2)
    pair_classifier.weight.data = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    model = CASN(Detector(), forward=detect, pair_classifier=pair_classifier, input_size=SIZE)
    return model.eval()


def tiny_casn() -> CASN:
    options = {"input_size": SIZE, "target_layer": "features", "hidden_dim": 16}
    return CASN(TinyBackbone(), forward=tiny_forward, **options)


def patched(row: int, column: int) -> PIL.Image.Image:
    """A grey picture with a red patch in one cell of the 8 x 4 map."""
    picture = np.full((*SIZE, 3), 128, np.uint8)
    picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (255, 0, 0)
    return PIL.Image.fromarray(picture)


def people(number: int = 3, cameras: int = 3) -> list[tuple[torch.Tensor, int, int]]:
    """Images of some people by some cameras, a sequence of (image, pid, camid)."""
    generator = torch.Generator().manual_seed(3)
    looks = torch.randn(number, 3, *SIZE, generator=generator)
    return [
        (looks[pid] + 1.5 * torch.randn(3, *SIZE, generator=generator), 10 + pid, camid)
        for pid in range(number)
        for camid in range(cameras)
    ]
