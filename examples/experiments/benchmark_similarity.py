#!/usr/bin/env python
"""How fast, and how exactly, the similarity of all pairs is explained, beside autograd.

python examples/experiments/benchmark_similarity.py
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark_heads import Head, make_head, table
from benchmark_speed import interleaved
from torch import Tensor, nn

from casn_plugin import Similarity, attention_distmat
from casn_plugin.attention import (
    attention_distance,
    row_profiles,
    similarity_attention,
)
from casn_plugin.basis import encode_head
from casn_plugin.identities import split_pairs

SIZES = {"GAP": (256, 256), "PCB": (256, 192), "OSNet": (512, 512)}


class _Similar(nn.Module):
    """All that ranking looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.pair_classifier = Similarity()


def autograd_distances(head: Head, first: Tensor, second: Tensor) -> Tensor:
    """Returns attention distances of pairs of maps by differentiating the cosine of every pair."""
    maps = torch.stack([first, second], 1).flatten(0, 1).requires_grad_()
    attention = similarity_attention(head.function(maps), maps, create_graph=False)
    return attention_distance(*split_pairs(row_profiles(attention)))


def speed_of(name: str, scale: float, repeats: int) -> list[list[str]]:
    """Returns pairs/s of one head: by autograd, and of all pairs in closed form."""
    head, model = make_head(name), _Similar()
    query, gallery = (head.encode(int(scale * size)) for size in SIZES[name])
    first, second = head.activations(16), head.activations(16)
    functions: dict[str, Callable[[], Any]] = {
        "autograd, batches of 16 pairs": partial(autograd_distances, head, first, second),
        "closed form, similarity": partial(attention_distmat, model, query, gallery),
        "closed form, pair classifier": partial(attention_distmat, head, query, gallery),
    }
    seconds = interleaved(functions, repeats, "cpu", name)
    pairs = dict.fromkeys(functions, len(query) * len(gallery))
    pairs["autograd, batches of 16 pairs"] = 16
    speeds = {key: pairs[key] / each for key, each in seconds.items()}
    base = speeds["autograd, batches of 16 pairs"]
    return [[name, key, f"{each:,.0f}", f"{each / base:,.1f}"] for key, each in speeds.items()]


def exactness_of(name: str) -> list[str]:
    """Returns how far 128 distances in float64 and in float32 are from autograd in float64."""
    head, model = make_head(name).double(), _Similar()
    maps = head.activations(24).double()
    expected = torch.stack(
        [autograd_distances(head, each.expand(16, -1, -1, -1), maps[8:]) for each in maps[:8]]
    )
    leaf = maps.clone().requires_grad_()
    encoding = encode_head(head.function(leaf), leaf)
    off = []
    for dtype in (torch.float64, torch.float32):
        images = encoding.to(dtype)
        found = attention_distmat(model, images[:8], images[8:])
        off.append(f"{(found.double() - expected).abs().max() / expected.max():.0e}")
    return [name, *off]


def main(argv: list[str] | None = None) -> list[str]:
    """Prints and returns both tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of images")
    args = parser.parse_args(argv)
    speed = [row for name in args.heads for row in speed_of(name, args.scale, args.repeats)]
    tables = [
        table("Speed of similarity (cpu)", ["Head", "What", "Pairs/s", "× autograd"], speed),
        table(
            "Exactness of similarity, largest error of 128 distances, relative to the largest",
            ["Head", "float64", "float32"],
            [exactness_of(name) for name in args.heads],
        ),
    ]
    print("\n".join(tables))
    return tables


if __name__ == "__main__":
    main()
