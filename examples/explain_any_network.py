#!/usr/bin/env python
"""Why does a network that never saw CASN find two pictures alike? Nothing is trained.

    python examples/explain_any_network.py --network osnet_x1_0 --weights osnet.pth a.jpg b.jpg
    python examples/explain_any_network.py --network mobilenet_v2 --weights mobilenet.pth *.jpg

The network is one of torchreid's by its name, or one of torchvision's with `features`. The first
picture is compared with all others: ranking.png is the list of those nearest, pair.png explains
the first of them.
"""

import argparse
from pathlib import Path
from typing import Any

import torchreid
import torchvision
from torch import Tensor

from casn_plugin import CASN, Similarity, explain_pair, explain_ranking
from casn_plugin.checkpoint import load_weights


def pooled_features(net: Any, imgs: Tensor) -> tuple[Any, Tensor]:
    """Returns no logits and the features of a network of torchvision: its last map, averaged."""
    return None, net.features(imgs).mean((2, 3))


def load_model(name: str, weights: str | None) -> CASN:
    """Returns a network whose pairs are explained by the similarity of their features."""
    ours = name in torchreid.models.__model_factory
    if ours:
        net = torchreid.models.build_model(name, 1, pretrained=False, use_gpu=False)
    else:
        net = torchvision.models.get_model(name)
    if weights is not None:
        taken = load_weights(net, weights)
        print(f"{len(taken)} of {len(net.state_dict())} tensors taken from {weights}")
    net, forward = net.eval(), None if ours else pooled_features
    return CASN(net, forward=forward, pair_classifier=Similarity())


def main(argv: list[str] | None = None) -> None:
    """Ranks all other pictures by their similarity with the first, and explains it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="osnet_x1_0")
    parser.add_argument("--weights", help="of the trained network; without, all it says is random")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures")
    parser.add_argument("pictures", nargs="+", help="the query, then the gallery")
    args = parser.parse_args(argv)
    query, *gallery = args.pictures
    model = load_model(args.network, args.weights)
    unknown = [(picture, -1, -1) for picture in gallery]
    (found,) = explain_ranking(model, [(query, -1, -1)], unknown)
    args.out.mkdir(parents=True, exist_ok=True)
    found.plot().savefig(args.out / "ranking.png")
    pair = explain_pair(model, query, gallery[found.matches[0].row])
    pair.plot().savefig(args.out / "pair.png")
    print(found.describe(), pair.describe(), sep="\n")


if __name__ == "__main__":
    main()
