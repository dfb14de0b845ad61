#!/usr/bin/env python
"""Does the attention of a pair mark what decides? Deletion and insertion, beside other maps.

    python examples/train_casn_pcb.py
    python examples/experiments/explained.py --checkpoint log/casn_pcb/model/model.pth.tar-10

Of every query one random match of another camera, or one random picture of somebody else, makes a
pair. Prints a table of gaps (insertion less deletion area; chance is 0) with 95 % intervals over
queries, and draws the curves.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import protocols
import torch
from jaxtyping import Bool, Int64
from measurements import class_maps
from plots import plot_faithfulness, save_small
from rows import markdown
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from casn_plugin import CASN, Encoding, ImageCASNEngine, Similarity
from casn_plugin.faithfulness import (
    FaithfulnessCurves,
    PairFaithfulness,
    centre_prior,
    pair_faithfulness,
)
from casn_plugin.identities import pairs_by_identity
from casn_plugin.imputation import Fill
from casn_plugin.loading import encode_loader
from casn_plugin.ranking import pair_attention

Maps = tuple[Tensor, Tensor]
SIDES = ("query", "gallery", "both")


def maps_of_pairs(
    model: CASN, first: Encoding, second: Encoding, loaders: Sequence[DataLoader[Any]]
) -> dict[str, Maps]:
    """Returns every kind of map of both pictures of the pairs."""
    similar = torch.nn.Module()
    similar.pair_classifier = Similarity()
    size = first.maps.shape[2], first.maps.shape[3]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, len(first), *size, generator=generator)
    return {
        "Siamese attention": pair_attention(model, first, second),
        "cosine of features": pair_attention(similar, first, second),
        "identification": (class_maps(model, loaders[0]), class_maps(model, loaders[1])),
        "centre": (centre_prior(len(first), size),) * 2,
        "random": (noise[0], noise[1]),
    }


def random_pairs(
    wanted: Bool[Tensor, "queries galleries"], number: int
) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
    """Returns rows and columns of pairs: of so many queries at most, one wanted pair of each."""
    generator = torch.Generator().manual_seed(1)
    rows = wanted.any(1).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)[:number]]
    chance = torch.rand(wanted.shape, generator=generator).masked_fill(~wanted, -1)
    return rows, chance.argmax(1)[rows]


def curves_of_pairs(
    model: CASN,
    query: Encoding,
    gallery: Encoding,
    loaders: dict[str, DataLoader[Any]],
    pairs: tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]],
    fill: Fill | Tensor = "neighbours",
) -> dict[str, PairFaithfulness]:
    """Returns the curves of every kind of map of some pairs.

    Args:
        model: a trained one.
        query: encodings of all queries.
        gallery: likewise.
        loaders: of "query" and "gallery", in the order of the encodings.
        pairs: rows of both.
        fill: what stands where pixels were.
    """
    some = [
        DataLoader(Subset(loaders[part].dataset, rows.tolist()), batch_size=64)
        for part, rows in zip(("query", "gallery"), pairs, strict=True)
    ]
    first, second = (torch.cat([batch["img"] for batch in each]) for each in some)
    maps = maps_of_pairs(model, query[pairs[0]], gallery[pairs[1]], some)
    return {
        name: pair_faithfulness(model, first, second, *both, fill=fill, progress=True)
        for name, both in maps.items()
    }


def faithfulness_of(engine: ImageCASNEngine, name: str, number: int = 32) -> dict[str, Any]:
    """Returns how faithful each kind of map of a trained model is, for pairs of one identity.

    By map, score ("evidence" of the pair classifier, "closeness" of the features) and side: the
    gap of every pair, and the mean deletion and insertion curves.
    """
    loaders = engine.test_loader[name]
    (query, *q_ids), (gallery, *g_ids) = (
        encode_loader(engine.casn, loaders[part]) for part in ("query", "gallery")
    )
    same, counted = pairs_by_identity(q_ids[0], g_ids[0], q_ids[1], g_ids[1])
    pairs = random_pairs(same & counted, number)
    found = curves_of_pairs(engine.casn, query, gallery, loaders, pairs)
    return {
        name: {
            score: {side: _numbers(curves) for side, curves in getattr(of, score).items()}
            for score in ("evidence", "closeness")
        }
        for name, of in found.items()
    }


def _numbers(curves: FaithfulnessCurves) -> dict[str, list[float]]:
    """Returns what is kept of curves, in four digits."""
    every = {
        "gap": curves.gap,
        "deletion": curves.deletion.mean(0),
        "insertion": curves.insertion.mean(0),
    }
    return {key: [float(f"{each:.4g}") for each in values] for key, values in every.items()}


def interval(gaps: Tensor) -> str:
    """Returns mean and 95 % interval of the mean, bootstrapped over queries."""
    found = stats.bootstrap((gaps.numpy(),), lambda x, axis: x.mean(axis), n_resamples=2000, rng=0)
    low, high = found.confidence_interval
    return f"{gaps.mean():.3f} [{low:.3f}, {high:.3f}]"


def table(found: dict[str, PairFaithfulness], score: str) -> str:
    """Returns the gaps of one score, one row a kind of map."""
    rows = [
        [name, *(interval(getattr(curves, score)[side].gap) for side in SIDES)]
        for name, curves in found.items()
    ]
    return markdown(["Map", *(f"pixels of {side}" for side in SIDES)], rows)


def main(argv: list[str] | None = None) -> dict[str, dict[str, PairFaithfulness]]:
    """Measures, prints and draws; returns the curves of pairs of one and of two identities."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="of examples/train_casn_pcb.py's default run")
    add("--pairs", type=int, default=128, help="pairs of each kind, at most")
    add("--fill", choices=("neighbours", "mean", "black"), default="neighbours")
    add("--picture", type=Path, help="of the curves of one identity, a .png")
    args = parser.parse_args(argv)
    if not Path(args.checkpoint).is_file() or args.pairs < 1:
        parser.error("--checkpoint must be a file and --pairs at least 1")
    model, loaders = protocols.trained(args.checkpoint)
    (query, *q_ids), (gallery, *g_ids) = (
        encode_loader(model, loaders[part]) for part in ("query", "gallery")
    )
    same, counted = pairs_by_identity(q_ids[0], g_ids[0], q_ids[1], g_ids[1])
    fill = model.preprocessing.black if args.fill == "black" else args.fill
    every = {}
    for kind, wanted in (("one identity", same & counted), ("two identities", ~same & counted)):
        pairs = random_pairs(wanted, args.pairs)
        found = every[kind] = curves_of_pairs(model, query, gallery, loaders, pairs, fill)
        for score, text in (("evidence", "same-identity logit"), ("closeness", "closeness")):
            print(
                f"\n{len(pairs[0])} pairs of {kind}, {text}, {args.fill}\n\n{table(found, score)}"
            )
    if args.picture:
        means = {
            name: {"deletion": curves.deletion.mean(0).tolist(),
                   "insertion": curves.insertion.mean(0).tolist()}
            for name, found in every["one identity"].items()
            for curves in (found.evidence["both"],)
        }  # fmt: skip
        figure = plot_faithfulness({"": means}, "same-identity logit, mean of pairs")
        save_small(figure, args.picture)
    return every


if __name__ == "__main__":
    main()
