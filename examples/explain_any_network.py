#!/usr/bin/env python
"""Why does a network that never saw CASN find two pictures alike? Nothing is trained.

    python examples/explain_any_network.py --network osnet_x1_0 --weights osnet.pth a.jpg b.jpg
    python examples/explain_any_network.py --network mobilenet_v2 --weights mobilenet.pth *.jpg

The network is one of torchreid's by its name, or one of torchvision's. The first picture is
compared with all others: ranking.png is the list of those nearest, pair.png explains the first.
"""

import argparse
from pathlib import Path

import torchvision

from casn_plugin import CASN, Similarity, explain_pair, explain_ranking
from casn_plugin.checkpoint import load_weights
from casn_plugin.packages import needed

with needed(quiet="Cython evaluation"):  # which is not used here
    import torchreid


def networks() -> list[str]:
    """Returns the names of all networks: torchreid's, then torchvision's."""
    return [*torchreid.models.__model_factory, *torchvision.models.list_models()]


def load_model(name: str, weights: str | None) -> CASN:
    """Returns a network whose pairs are explained by the similarity of their features."""
    if name in torchreid.models.__model_factory:
        net = torchreid.models.build_model(name, 1, pretrained=False, use_gpu=False)
    else:
        net = torchvision.models.get_model(name)
    if weights is not None:
        taken = load_weights(net, weights)
        print(f"{len(taken)} of {len(net.state_dict())} tensors taken from {weights}")
    return CASN(net.eval(), pair_classifier=Similarity())


def main(argv: list[str] | None = None) -> None:
    """Ranks all other pictures by their similarity with the first, and explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [options] QUERY PICTURE ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--network", default="osnet_x1_0")
    parser.add_argument("--weights", help="of the trained network; without, all it says is random")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures")
    parser.add_argument("pictures", nargs="+", help="the query, then the gallery")
    args = parser.parse_args(argv)
    query, *gallery = args.pictures
    if not gallery:
        parser.error("a query and at least one other picture are expected")
    missing = [file for file in (*args.pictures, args.weights) if file and not Path(file).is_file()]
    if missing:
        parser.error(f"there is no file {missing[0]}")
    if args.network not in networks():
        parser.error(f"--network: expected one of {', '.join(networks())}, got {args.network}")
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
