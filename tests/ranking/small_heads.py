"""Heads of networks, pair classifiers and galleries that the tests of ranking share."""

import reference
import torch
from torch import nn

from casn_plugin import PairClassifier
from casn_plugin.basis import encode_head

CHANNELS, PARTS = 8, 3


class Model(nn.Module):
    """All that ranking looks at."""

    def __init__(self, pair_classifier: nn.Module) -> None:
        super().__init__()
        self.pair_classifier = pair_classifier


def pooled(activations):
    return activations.mean((2, 3))


def parts(activations):
    return reference.pcb_embedding(activations, PARTS)


def make_embedding():
    torch.manual_seed(5)
    layers = nn.Sequential(nn.Linear(CHANNELS, 7), nn.BatchNorm1d(7), nn.ReLU()).double().eval()
    return lambda activations: layers(activations.relu().mean((2, 3)))


def normalized(activations):
    return nn.functional.normalize(activations.flatten(1), dim=1)


HEADS = {
    "pooled": (pooled, "basis"),
    "parts": (parts, "activations"),
    "embedding": (make_embedding(), "basis"),
    "normalized": (normalized, "basis"),
}
CLASSIFIERS = {
    "two layers": lambda dim: PairClassifier(dim, 16),
    "affine": lambda dim: nn.Linear(dim, 2),
    "affine, two layers": lambda dim: nn.Sequential(nn.Linear(dim, 9), nn.Linear(9, 2)),
    "smooth": lambda dim: nn.Sequential(nn.Linear(dim, 9), nn.Tanh(), nn.Linear(9, 2)),
}


def encode(head, activations):
    activations = activations.detach().requires_grad_()
    return encode_head(head(activations), activations)


class Blocks:
    """A gallery that is no Encoding: it counts what is read of it."""

    def __init__(self, encoding):
        self.encoding, self.read = encoding, 0

    def __len__(self):
        return len(self.encoding)

    def __getitem__(self, rows):
        some = self.encoding[rows]
        self.read += len(some)
        return some

    def features_of(self, rows):
        return self.encoding.features[rows]
