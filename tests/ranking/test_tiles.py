"""The grid of tiles: every pair once, within its budget. Integers only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casn_plugin.ranking.tiles import Grid

SIZES = st.fixed_dictionaries({
    "queries": st.integers(0, 60),
    "galleries": st.integers(0, 60),
    "budget": st.integers(1, 10**6) | st.just(2**60),
    "pair": st.integers(1, 2000),
    "listed": st.integers(1, 2000),
    "image": st.integers(1, 5000),
    "features": st.integers(1, 5000),
    "resident": st.booleans(),
})  # fmt: skip


@given(SIZES)
def test_tiles_cover_every_pair_once(sizes):
    grid = Grid.fit(**sizes)
    queries, galleries = list(range(grid.queries)), list(range(grid.galleries))
    strips = [strip for panel in grid.panels() for strip in grid.strips(panel)]
    for portions, every in ((strips, queries), (grid.blocks(), galleries)):
        assert all(0 <= each.start < each.stop <= len(every) for each in portions)
        assert [row for each in portions for row in every[each]] == every
    assert [row for rows in grid.comparisons() for row in queries[rows]] == queries
    for panel in grid.panels():
        assert all(panel.start <= strip.start < panel.stop for strip in grid.strips(panel))
        assert [row for strip in grid.strips(panel) for row in queries[strip]] == queries[panel]


@given(SIZES)
def test_tiles_keep_to_their_budget(sizes):
    """Each piece does, or is as small as a piece can be."""
    grid, budget, resident = Grid.fit(**sizes), sizes["budget"], sizes["resident"]
    tile = grid.rows * grid.columns
    assert grid.rows == 1 or grid.rows**2 <= 16 * max(budget // sizes["pair"], 1)
    for_pairs = budget if resident else budget // 2
    assert tile == 1 or tile * sizes["pair"] <= for_pairs
    assert grid.listed == 1 or grid.listed * sizes["listed"] <= for_pairs
    assert grid.compared == 1 or grid.compared * sizes["features"] <= budget
    assert grid.panel % grid.rows == 0
    if not resident and grid.columns > 1:  # a panel, a block and the one that is on its way
        assert (grid.panel + grid.columns) * sizes["image"] <= budget // 2
    if resident and grid.queries:
        assert grid.panel <= grid.queries and len(grid.panels()) <= 1 + grid.rows


@given(SIZES)
def test_more_memory_never_makes_more_tiles(sizes):
    small, large = (Grid.fit(**{**sizes, "budget": n * sizes["budget"]}) for n in (1, 4))
    assert len(large.blocks()) <= len(small.blocks())
    assert large.listed >= small.listed


@pytest.mark.parametrize("resident", [False, True])
def test_wide_tiles_are_multiples_of_what_products_are_fast_for(resident):
    for budget in range(100, 1_000_000, 7777):
        grid = Grid.fit(
            1000, 1000, budget, pair=10, listed=40, image=10, features=8, resident=resident
        )
        for side in (grid.rows, grid.columns):
            assert side <= 16 or side % 16 == 0 or side == 1000


@pytest.mark.parametrize(("galleries", "sizes"), [(256, [128] * 2), (500, [128] * 3 + [116])])
def test_tiles_are_as_wide_as_one_another(galleries, sizes):
    """Not 144 and a narrow rest: narrow products are slow."""
    grid = Grid.fit(
        9, galleries, 181**2, pair=1, listed=1, image=1, features=1, resident=True
    )  # fmt: skip
    assert [block.stop - block.start for block in grid.blocks()] == sizes


def test_one_pair_at_a_time_where_nothing_fits():
    grid = Grid.fit(3, 2, 1, pair=100, listed=100, image=100, features=100, resident=False)
    assert (grid.columns, grid.rows, grid.panel, grid.listed, grid.compared) == (1, 1, 1, 1, 1)
    assert grid.blocks() == [slice(0, 1), slice(1, 2)] and len(grid.panels()) == 3


@pytest.mark.parametrize("resident", [False, True])
def test_with_room_for_all_there_is_one_tile(resident):
    grid = Grid.fit(30, 50, 2**60, pair=100, listed=100, image=100, features=100, resident=resident)
    assert grid.blocks() != [] and grid.panels() == [slice(0, 30)] == grid.strips(slice(0, 30))
    assert grid.comparisons() == [slice(0, 30)] and grid.blocks() == [slice(0, 50)]
