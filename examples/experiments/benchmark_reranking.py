"""How fast k-reciprocal re-ranking is beside torchreid's, and what memory it takes."""

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torchreid
from benchmark_heads import table
from benchmark_speed import interleaved
from torch import Tensor, nn

from casn_plugin import Encoding, RankingOptions, Reciprocity, rerank, rerank_neighbours
from casn_plugin.ranking import fused_distmats, fused_neighbourhood, rerank_neighbourhood

LISTED = 50
APART, OVERLAPPING = 0.7, 3.0
"""How far images spread around their identity."""


def features_of(images: int, spread: float = APART) -> Tensor:
    """Returns features of unit length, of ten images of each identity."""
    torch.manual_seed(0)
    centres = torch.randn(max(1, images // 10), 64)
    every = centres[torch.randint(len(centres), (images,))] + spread * torch.randn(images, 64)
    return torch.nn.functional.normalize(every)


def peak_of(function: Callable[[], Any]) -> float:
    """Returns the most memory, in MiB, that NumPy has taken for a function."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


def reranking(args: argparse.Namespace) -> str:
    """Returns seconds, deviation and memory of torchreid's function, of matrices and of lists."""
    rows = []
    for images, queries, spread in (
        (1000, 200, APART), (3000, 600, APART), (5000, 1000, APART), (5000, 2500, APART),
        (5000, 1000, OVERLAPPING), (5000, 2500, OVERLAPPING),
    ):  # fmt: skip
        images, queries = int(images * args.scale), int(queries * args.scale)
        features = features_of(images, spread)
        distmat = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        near, greatest = distmat.topk(min(LISTED, images), largest=False), distmat.amax(1)
        first, rest = slice(queries), slice(queries, None)
        q_g, q_q, g_g = (
            distmat[part].contiguous() for part in ((first, rest), (first, first), (rest, rest))
        )
        theirs = [part.numpy() for part in (q_g, q_q, g_g)]
        lists = partial(rerank_neighbours, near.indices, near.values, queries)
        functions: dict[str, Callable[[], Any]] = {
            "torchreid": partial(torchreid.utils.re_ranking, *theirs),
            "matrices": partial(rerank, q_g, q_q, g_g),
            "lists": lists,
            "lists, greatest known": partial(lists, greatest=greatest),
        }
        expected = functions["torchreid"]()
        remarks = {"torchreid": ""}
        off = np.abs(functions["matrices"]().numpy() - expected).max()
        remarks["matrices"] = f"off by {off:.0e}"
        for name in [*functions][2:]:
            same = functions[name]().indices[:, 0].numpy() == expected.argmin(1)
            remarks[name] = f"same nearest for {same.mean():.1%}"
        seconds = interleaved(functions, args.repeats, "cpu", f"{images} images")
        what = f"{images:,}, {queries:,} of them queries" + (
            ", overlapping" if spread == OVERLAPPING else ""
        )
        rows += [
            [
                what, name, f"{each:.3f} s",
                f"{seconds['torchreid'] / each:.1f}", remarks[name],
                f"{peak_of(functions[name]):,.0f} MiB",
            ]
            for name, each in seconds.items()
        ]  # fmt: skip
    rows.append(lists_of_many(int(50_000 * args.scale)))
    header = ["Images", "What", "Time", "× torchreid", "Result", "Memory of NumPy"]
    return table(f"Re-ranking, lists of {LISTED}", header, rows)


def of_a_trained_model(
    model: nn.Module, query: Encoding, gallery: Encoding
) -> Iterator[tuple[str, Tensor, float]]:
    """Yields what is re-ranked, its final distances and the seconds it took."""
    first, parameters = len(query), Reciprocity()
    distmat = fused_distmats(model, query, gallery).fused
    start = time.perf_counter()
    every = Encoding.cat([query, gallery])
    square = fused_distmats(model, every, every).fused
    square = (square + square.T) / 2
    final = rerank(square[:first, first:], square[:first, :first], square[first:, first:])
    yield "re-ranked, all pairs of all images", final, time.perf_counter() - start
    for shortlist in (100, 50):
        start = time.perf_counter()
        options = RankingOptions(shortlist=shortlist)
        images = fused_neighbourhood(
            model, query, gallery, distmat, number=parameters.needed, options=options
        )
        final = rerank_neighbourhood(images, parameters)
        yield f"re-ranked, {shortlist} listed", final, time.perf_counter() - start


def lists_of_many(images: int) -> list[str]:
    """Returns the row of more images than matrices could be made of."""
    features = features_of(images)
    found = [torch.cdist(some, features).topk(LISTED, 1, largest=False)
             for some in features.split(1000)]  # fmt: skip
    indices = torch.cat([each.indices for each in found])
    values = torch.cat([each.values for each in found])

    def function() -> Any:
        return rerank_neighbours(indices, values, images // 50)

    seconds = interleaved({"": function}, 1, "cpu", f"{images} images")[""]
    what = f"{images:,}, {images // 50:,} of them queries"
    return [what, "lists", f"{seconds:.3f} s", "", "", f"{peak_of(function):,.0f} MiB"]
