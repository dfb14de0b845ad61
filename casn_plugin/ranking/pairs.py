"""The pairs of queries and gallery images, brought to the device in pieces of bounded size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.hooks import evaluating, place_of, unwrapped
from casn_plugin.ranking.closed_form import Direction, Directions, PairForm, pair_form
from casn_plugin.ranking.compute import Arithmetic, Compute
from casn_plugin.ranking.sides import Align, Images, Scratch, Side, as_compared, map_bytes
from casn_plugin.ranking.tiles import Grid


@dataclass(frozen=True)
class Tile:
    """All pairs of some queries and some gallery images, on the device.

    Attributes:
        rows: which queries they are.
        columns: which gallery images.
        first: the queries.
        second: the gallery images.
        form: the pair classifier that looks at them.
        directions: gives the directions of attention of these pairs.
        scratch: memory for maps.
    """

    rows: slice
    columns: slice
    first: Side
    second: Side
    form: PairForm
    directions: Directions
    scratch: Scratch

    def alpha(self) -> Bool[Tensor, "queries galleries dim"]:
        """Returns α (Eq. 4) of the pairs; it lasts until the next tile's is asked for."""
        return self.directions.of_all(self.first.keys, self.second.keys)[0].along

    def distances(self, align: Align) -> Float[Tensor, "queries galleries"]:
        """Returns the l2 distances of the row profiles of both images of the pairs.

        Args:
            align: what is done to profiles in [0, 1] first.
        """
        mine, its = self.directions.of_all(self.first.keys, self.second.keys)
        first = self.first.profiles(mine, self.scratch, align)
        second = self.second.profiles(its, self.scratch, align)
        distances: Tensor = torch.linalg.vector_norm(first.sub_(second.transpose(0, 1)), dim=-1)
        return distances

    def logits(self) -> Float[Tensor, "queries galleries"]:
        """Returns z1 − z0 of the pairs, or their similarity."""
        return self.form.logits(self.first.keys, self.second.keys)


class ListedPairs(NamedTuple):
    """Some of the pairs that were asked for, on the device.

    Attributes:
        rows: their queries.
        columns: their gallery images.
        features: distances of their features.
        first: row profiles of the queries.
        second: row profiles of the gallery images.
    """

    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    features: Float[Tensor, " pairs"]
    first: Float[Tensor, "pairs height"]
    second: Float[Tensor, "pairs height"]


class Pairs:
    """The pairs of some queries and a gallery: all of them, listed ones, or their features alone.

    Each process goes through its own share of the gallery, block by block.

    Args:
        model: its `pair_classifier` looks at the pairs, and is where they are worked on.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery.
        compute: with what the pairs are worked on.

    Attributes:
        shape: number of queries, number of gallery images.
        device: where the pairs are worked on.

    Raises:
        TypeError, ValueError: as :func:`check_alike` and :func:`pair_classifier_of`.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> pairs = Pairs(model, images, images)
        >>> with pairs.working():
        ...     [tile.logits().shape for tile in pairs.tiles()]
        [torch.Size([3, 3])]
    """

    def __init__(
        self, model: nn.Module, query: Encoding, gallery: Encodings, compute: Compute | None = None
    ) -> None:
        self._compute = compute = Compute() if compute is None else compute
        check_alike(query, gallery)
        self._pair_classifier = pair_classifier_of(model)
        self.device = device_of(model, query.features)
        self.shape = len(query), len(gallery)
        memory = compute.memory(self.device)
        arithmetic = Arithmetic(
            self.device, query.features.dtype, compute.precision, scratch=memory // 64
        )
        dim = query.features.shape[1]
        self._form = pair_form(self._pair_classifier, arithmetic, dim=dim, parts=query.parts)
        self._queries = Images(query, self._form, arithmetic, is_query=True)
        self._galleries = Images(gallery, self._form, arithmetic, is_query=False)
        self._scratch = Scratch(arithmetic)
        self._home = query.features[:0]  # whose dtype and device results have
        of_pair, of_listed, of_image = map_bytes(query, arithmetic)
        self._grid = Grid.fit(
            *self.shape,
            memory * 7 // 8,  # five buffers of a 64th each, and what is made of profiles
            pair=self._form.pair_bytes() + of_pair,
            listed=self._form.listed_bytes() + of_listed,
            image=of_image,
            features=16 * dim,
            resident=self._queries.resident and self._galleries.resident,
        )
        self._processes = compute.processes()
        self._blocks = self._processes.share(self._grid.blocks())
        self._in_memory = isinstance(gallery, Encoding) and not compute.distributed

    @contextmanager
    def working(self) -> Iterator[None]:
        """In this context the pairs are worked on: all processes finish, or none.

        Raises:
            RuntimeError: another process has failed.
        """
        with undisturbed(self._pair_classifier, self.device), self._processes.together():
            yield

    def join(self, *own: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Returns tensors joined with those of the other processes."""
        return self._processes.join(*own, dim=dim)

    def tiles(self, desc: str | None = None) -> Iterator[Tile]:
        """Yields all pairs of this process's share, tile by tile, under a progress bar."""
        with self._compute.bar(self._of_share(), desc) as bar:
            for panel in self._grid.panels():
                first = self._queries.side(panel)
                for block in self._blocks:
                    second = self._galleries.side(block)
                    directions = self._form.directions(first.keys, second.keys)
                    for rows in self._grid.strips(panel):
                        some = first[rows.start - panel.start : rows.stop - panel.start]
                        yield Tile(rows, block, some, second, self._form, directions, self._scratch)
                        bar.update(len(some) * len(second))

    def matrix(
        self, function: Callable[[Tile], Tensor], desc: str
    ) -> Float[Tensor, "queries galleries"]:
        """Returns the matrix of a function of tiles, the shares of all processes joined.

        Args:
            function: gives (queries, galleries) values of a tile.
            desc: what the progress bar says.

        Returns:
            Values in the dtype of the queries' features, on their device.
        """
        start = self._blocks[0].start if self._blocks else 0
        stop = self._blocks[-1].stop if self._blocks else 0
        own = self._home.new_empty(self.shape[0], stop - start)
        for tile in self.tiles(desc):
            columns = slice(tile.columns.start - start, tile.columns.stop - start)
            own[tile.rows, columns] = function(tile).to(own.device)
        return self.join(own, dim=1)[0]

    def profiles(
        self, alpha: Bool[Tensor, "1 dim"], align: Align
    ) -> tuple[Float[Tensor, "queries height"], Float[Tensor, "galleries height"]]:
        """Returns the row profiles of all images under one α, those of all processes joined.

        Args:
            alpha: the one.
            align: what is done to the profiles.
        """

        def of(side: Side) -> Tensor:
            every = Direction(alpha.expand(len(side), 1, -1))
            return side.profiles(every, self._scratch, align)[:, 0]

        first = [
            of(self._queries.side(panel)[rows.start - panel.start : rows.stop - panel.start])
            for panel in self._grid.panels()
            for rows in self._grid.strips(panel)
        ]
        second = [of(self._galleries.side(block)) for block in self._blocks]
        nothing = first[0][:0]
        return torch.cat(first), self.join(torch.cat([nothing, *second]))[0]

    def one_indicator(self) -> Bool[Tensor, "1 dim"] | None:
        """Returns the α of all pairs, where they have but one: an affine pair classifier."""
        return self._form.one_indicator()

    def features(self, *, unit: bool) -> tuple[Tensor, Tensor] | None:
        """Returns the features of all queries and all gallery images, as they are compared.

        None where the gallery is no encoding in memory, or where it is shared by processes.
        """
        if not self._in_memory:
            return None
        return self._queries.features(unit=unit), self._galleries.features(unit=unit)

    def feature_distances(
        self, *, unit: bool, desc: str | None = None
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "queries galleries"]]]:
        """Yields queries, gallery images and the l2 distances of their features, of the share.

        In float64, which no setting of the matrix products makes coarser.

        Args:
            unit: of features of unit length.
            desc: what a progress bar says.
        """
        with self._compute.bar(self._of_share(), desc) as bar:
            for rows in self._grid.comparisons():
                qf = self._queries.features(rows, unit=unit).double()
                squares = qf.square().sum(1)[:, None]
                for block in self._blocks:
                    gf = self._galleries.features(block, unit=unit).double()
                    distances = torch.addmm(gf.square().sum(1)[None], qf, gf.T, alpha=-2)
                    distances += squares
                    yield rows, block, distances.clamp_(min=0).sqrt_()
                    bar.update(distances.numel())

    def listed(
        self, rows: Tensor, columns: Tensor, *, unit: bool, desc: str | None = None
    ) -> Iterator[ListedPairs]:
        """Yields those of listed pairs that are of this process's share, by gallery image.

        Args:
            rows: queries.
            columns: gallery images, as many.
            unit: compare features of unit length.
            desc: what a progress bar says.
        """
        order = columns.argsort(stable=True)
        rows, columns = rows[order], columns[order]
        edges = [*(block.start for block in self._blocks), *(b.stop for b in self._blocks[-1:])]
        cuts = torch.searchsorted(columns, columns.new_tensor(edges)).tolist()
        own = slice(cuts[0], cuts[-1]) if cuts else slice(0)
        self._galleries.expect(columns[own].unique_consecutive())
        with self._compute.bar(len(rows), desc) as bar:
            for block, (start, stop) in zip(self._blocks, pairwise(cuts), strict=True):
                if start < stop:
                    yield from self._listed_in(block, rows[start:stop], columns[start:stop], unit)
                    bar.update(stop - start)

    def _listed_in(
        self, block: slice, rows: Tensor, columns: Tensor, unit: bool
    ) -> Iterator[ListedPairs]:
        """Yields listed pairs of one block, sorted by gallery image: its maps are one product."""
        needed, places = columns.unique_consecutive(return_inverse=True)
        if self._galleries.resident or len(needed) == block.stop - block.start:
            second, places = self._galleries.side(block), columns - block.start
        else:  # no others are read, or encoded
            second = self._galleries.side(needed.cpu())
        for panel in self._grid.panels():
            inside = (rows >= panel.start) & (rows < panel.stop)
            if not inside.any():
                continue
            first = self._queries.side(panel)
            directions = self._form.directions(first.keys, second.keys)
            qf, gf = (as_compared(each.features, unit=unit) for each in (first, second))
            listed = (each[inside].split(self._grid.listed) for each in (rows, columns, places))
            for i, j, its in zip(*listed, strict=True):
                mine = i - panel.start
                towards_first, towards_second = directions.of_listed(
                    first.keys.index_select(0, mine), second.keys.index_select(0, its)
                )
                by_second = second.listed_profiles(its, towards_second)
                order = mine.argsort(stable=True)
                by_first = torch.empty_like(by_second)
                by_first[order] = first.listed_profiles(mine[order], towards_first.pick(order))
                features = (qf.index_select(0, mine) - gf.index_select(0, its)).norm(dim=1)
                yield ListedPairs(i, j, features, by_first, by_second)

    def _of_share(self) -> int:
        """Returns the number of pairs of this process's share."""
        return self.shape[0] * sum(len(range(block.start, block.stop)) for block in self._blocks)


@contextmanager
def undisturbed(pair_classifier: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and the pair classifier in eval mode."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        evaluating(pair_classifier),
    ):
        yield


def pair_classifier_of(model: nn.Module) -> nn.Module:
    """Returns the pair classifier of a model.

    Raises:
        ValueError: it has none, or one whose weights are not finite.
    """
    wrapped = unwrapped(model)
    pair_classifier = getattr(wrapped, "pair_classifier", None)
    if not isinstance(pair_classifier, nn.Module):
        raise ValueError(f"{type(wrapped).__name__} has no pair_classifier; is it a CASN?")
    for name, parameter in pair_classifier.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"the pair classifier must be finite, but its {name} is not")
    return pair_classifier


def device_of(model: nn.Module, features: Tensor) -> torch.device:
    """Returns where pairs are worked on: where the pair classifier is, or a model without weights.

    Args:
        model: its `pair_classifier` looks at the pairs.
        features: where they are is where, if neither has parameters.
    """
    some = place_of(unwrapped(model), features).device
    return place_of(pair_classifier_of(model), features.new_empty(0, device=some)).device


def check_alike(query: Encoding, gallery: Encodings) -> None:
    """Raises TypeError or ValueError for images that no one model has encoded."""
    some = gallery[:0]
    if not isinstance(query, Encoding) or not isinstance(some, Encoding):
        raise TypeError(
            "query and gallery must be what model.encode gives, got "
            f"{type(query).__name__} and {type(gallery).__name__}"
        )
    if (query.basis is None) != (some.basis is None):
        raise TypeError("query and gallery must be encoded by one model, got unlike encodings")
    if query.maps.shape[1:] != some.maps.shape[1:] or (
        query.features.shape[1] != some.features.shape[1]
    ):
        raise ValueError(
            "query and gallery must be encoded by one model at one image size, got maps of "
            f"{tuple(query.maps.shape[1:])} and {tuple(some.maps.shape[1:])}"
        )
    if query.features.dtype != some.features.dtype or query.features.dtype.itemsize < 4:
        raise TypeError(
            "query and gallery must have features of one dtype, float32 or wider, got "
            f"{query.features.dtype} and {some.features.dtype}"
        )
