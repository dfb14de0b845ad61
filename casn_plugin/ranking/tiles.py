"""The grid of tiles: how many pairs at a time a budget of bytes allows. Integers, no tensors."""

from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class Grid:
    """How the pairs of some queries and gallery images are cut into tiles of bounded size.

    It depends on sizes alone, so however many processes share its blocks, each tile is computed by
    the same operations on the same numbers. :meth:`fit` makes it from a budget.

    Attributes:
        queries: number of queries.
        galleries: number of gallery images.
        columns: gallery images of a block, which are on the device at a time.
        panel: queries of a panel, which are on the device at a time: some times `rows`.
        rows: queries of a tile.
        listed: listed pairs that are worked on at a time.
        compared: queries whose features are compared with a block's at a time.

    Example:
        >>> grid = Grid(queries=5, galleries=3, columns=2, panel=4, rows=2, listed=1, compared=5)
        >>> grid.blocks()
        [slice(0, 2, None), slice(2, 3, None)]
        >>> [grid.strips(panel) for panel in grid.panels()]
        [[slice(0, 2, None), slice(2, 4, None)], [slice(4, 5, None)]]
    """

    queries: int
    galleries: int
    columns: int
    panel: int
    rows: int
    listed: int
    compared: int

    @classmethod
    def fit(
        cls,
        queries: int,
        galleries: int,
        budget: int,
        *,
        pair: int,
        listed: int,
        image: int,
        features: int,
        resident: bool,
    ) -> "Grid":
        """Returns the grid that keeps to a budget; one pair at a time where it is too small.

        Args:
            queries: number of queries.
            galleries: number of gallery images.
            budget: bytes.
            pair: bytes of a pair of a tile.
            listed: bytes of a listed pair: what it is made of is copied.
            image: bytes of an image that is brought to the device.
            features: bytes of an image's features as they are compared.
            resident: the images are on the device already: half of the budget is theirs if not.

        Example:
            >>> grid = Grid.fit(
            ...     100, 100, 1000, pair=10, listed=40, image=50, features=8, resident=False
            ... )
            >>> grid.columns
            5
        """
        images = budget // 2 // image
        of_pairs = budget if resident else budget // 2
        pairs = of_pairs // pair
        columns = isqrt(pairs) if resident else min(isqrt(pairs), images // 2)
        columns = _alike(galleries, columns)
        panel = queries if resident else max(images - columns, 1)
        # where images are few, no strip of the others is so long that one image's maps overrun
        rows = _alike(queries, min(pairs // columns, panel, 4 * max(isqrt(pairs), 1)))
        return cls(
            queries=queries,
            galleries=galleries,
            columns=columns,
            panel=max(panel // rows, 1) * rows,
            rows=rows,
            listed=max(of_pairs // 2 // listed, 1),  # distances of features are there meanwhile
            compared=max(budget // (96 * columns + features), 1),
        )

    def blocks(self) -> list[slice]:
        """Returns the gallery in portions of `columns`."""
        return portions(0, self.galleries, self.columns)

    def panels(self) -> list[slice]:
        """Returns the queries in portions of `panel`."""
        return portions(0, self.queries, self.panel)

    def strips(self, panel: slice) -> list[slice]:
        """Returns the queries of a panel in portions of `rows`: with a block, each is a tile."""
        return portions(panel.start, panel.stop, self.rows)

    def comparisons(self) -> list[slice]:
        """Returns the queries in portions of `compared`."""
        return portions(0, self.queries, self.compared)


def _alike(number: int, most: int) -> int:
    """Returns how many of so many things to take at a time: at most `most`, nearly the same times.

    Where there is more than one portion, its size is one that matrix products are fast for; the
    last may be a remainder.
    """
    if number <= most:
        return max(number, 1)
    most = next((most // step * step for step in (48, 16) if most > step), max(most, 1))
    each = -(-number // -(-number // most))
    return min(-(-each // 16) * 16, most)


def portions(start: int, stop: int, size: int) -> list[slice]:
    """Returns the rows from start to stop in portions of a size; the last one may be smaller.

    Example:
        >>> portions(0, 5, 3)
        [slice(0, 3, None), slice(3, 5, None)]
    """
    return [slice(each, min(each + size, stop)) for each in range(start, stop, size)]
