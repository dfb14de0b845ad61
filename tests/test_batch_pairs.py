"""What pairs that are chosen inside of a batch must hold, for any batch."""

import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casn_plugin import BatchPairs, PairSampler
from casn_plugin.batch_pairs import check_rows

batches = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 3)), max_size=24)
seeds = st.integers(0, 2**32)


def columns(rows) -> tuple[list[int], list[int]]:
    return [pid for pid, _ in rows], [camid for _, camid in rows]


def crosses(camids, i, j) -> bool:
    return camids[i] != camids[j] or camids[i] == -1


@given(
    rows=batches,
    number=st.none() | st.integers(1, 30),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
    seed=seeds,
)
@settings(deadline=None, max_examples=400)
def test_every_choice_holds_what_is_promised(rows, number, fraction, seed):
    pids, camids = columns(rows)
    chosen = BatchPairs(number, fraction, seed).draw(pids, camids)
    assert chosen.dtype == torch.int64 and chosen.shape[1:] == (2,)
    found = [tuple(sorted(pair)) for pair in chosen.tolist()]
    valid = {(i, j): same for i, j, same in reference.pairs_of_a_batch(pids)}
    assert len(set(found)) == len(found) and set(found) <= set(valid)  # known, no self, no twice
    there = sum(valid.values())
    positives = [pair for pair in found if valid[pair]]
    wanted = number or max(len(rows) // 2, 1)
    least = round(wanted * fraction)
    if 0 < fraction < 1:  # the number is kept as far as there are pairs at all
        assert len(found) == min(wanted, len(valid))
        assert len(positives) == min(there, max(least, wanted - (len(valid) - there)))
    else:
        assert len(positives) == min(there, least)
        expected = 0 if fraction else min(wanted, len(valid) - there)
        assert len(found) - len(positives) == expected
    across = {pair for pair, same in valid.items() if same and crosses(camids, *pair)}
    within = [pair for pair in positives if pair not in across]
    assert not within or across <= set(positives)  # of one camera only once the others are gone


@given(rows=batches, seed=seeds)
@settings(deadline=None, max_examples=100)
def test_all_pairs_are_all_pairs(rows, seed):
    pids, camids = columns(rows)
    found = sorted(tuple(sorted(pair)) for pair in BatchPairs("all", seed=seed).draw(pids, camids))
    assert [tuple(map(int, pair)) for pair in found] == [
        (i, j) for i, j, _ in reference.pairs_of_a_batch(pids)
    ]


@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=8, max_size=24))
@settings(deadline=None, max_examples=60)
def test_batch_and_seed_decide_and_nothing_else(rows):
    pids, camids = columns(rows)
    first = BatchPairs(seed=3).draw(pids, camids)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    tensors = torch.tensor(pids), torch.tensor(camids)
    assert torch.equal(BatchPairs(seed=3).draw(*tensors), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [BatchPairs(seed=seed).draw(pids, camids).tolist() for seed in range(8)]
    assert any(each != first.tolist() for each in others)


def test_other_people_and_other_cameras_have_other_pairs():
    pids, camids = torch.arange(8).repeat_interleave(4), torch.randint(0, 4, (6, 32))
    others = [pids + 8 * number for number in range(6)]
    for batches in ([(pids, each) for each in camids], [(each, None) for each in others]):
        drawn = {str(BatchPairs().draw(*batch).sort(1).values.tolist()) for batch in batches}
        assert len(drawn) == 6


def test_every_image_of_a_balanced_batch_is_compared_about_once():
    pids, camids = torch.arange(16).repeat_interleave(4), torch.arange(4).repeat(16)
    uses = [BatchPairs(seed=seed).draw(pids, camids).flatten().bincount(minlength=64)
            for seed in range(20)]  # fmt: skip
    assert max(int(each.max()) for each in uses) <= 2
    assert float(torch.stack(uses).eq(1).float().mean()) > 0.95
    first = torch.cat([BatchPairs(seed=seed).draw(pids, camids) for seed in range(20)])
    assert 0.4 < float((first[:, 0] < first[:, 1]).float().mean()) < 0.6  # in either order


@pytest.mark.parametrize("pids", [[], [3], [-1, -1, -1], [None, 4], [-1, 2, -1]])
def test_a_batch_without_a_pair_has_none(pids):
    for number in (None, 5, "all"):
        assert BatchPairs(number).draw(pids).shape == (0, 2)


def test_all_alike_and_all_different():
    assert len(BatchPairs(6).draw([5] * 8)) == 6 == len(BatchPairs(6).draw(range(8)))
    assert len(BatchPairs(6, 1.0).draw(range(8))) == 0 == len(BatchPairs(6, 0.0).draw([5] * 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"number": 0}, ValueError, "number must be at least 1, got 0"),
        ({"number": 2.5}, TypeError, "number must be an integer, got float"),
        ({"number": "every"}, ValueError, "number must be 'all', got 'every'"),
        ({"number": "all", "positive_fraction": 1.0}, ValueError, "'all' takes every pair"),
        ({"positive_fraction": 1.5}, ValueError, r"must lie in \[0, 1\], got 1.5"),
        ({"positive_fraction": None}, TypeError, "positive_fraction must be a number"),
        ({"seed": -1}, ValueError, "seed must be >= 0"),
    ],
)
def test_bad_options_are_refused(unchecked, options, error, message):
    with pytest.raises(error, match=message):
        BatchPairs(**options)


def test_ids_of_another_kind_are_refused(unchecked):
    with pytest.raises(TypeError, match="pids must be integers"):
        BatchPairs().draw([0.5, 1.0])
    with pytest.raises(ValueError, match=r"camids must be of shape \(4,\)"):
        BatchPairs().draw([1, 1, 2, 2], [0, 1])


@pytest.mark.parametrize("images", [3, 4, 5, 8])
def test_an_identity_balanced_batch_is_no_batch_of_rows(images):
    for order in ([0, 1, 2, 3], [0, 1, 1, 2], [2, 0, 2, 1]):
        pids = torch.tensor(order).repeat_interleave(images)
        message = rf"\(PK\) batch, {images} images.*pairs=BatchPairs\(\).*PairSampler"
        with pytest.raises(ValueError, match=message):
            check_rows(pids)


def test_rows_that_are_alike_by_chance_are_not_refused():
    for lengths in ([3, 4, 3], [4, 5], [5, 2, 1], [8]):
        check_rows(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))


def test_two_of_each_are_pairs_but_a_warning_tells():
    with pytest.warns(UserWarning, match="all 4 pairs of a batch .* show one identity"):
        check_rows(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))


@given(people=st.integers(2, 5), half_batch=st.integers(1, 9), seed=seeds)
@settings(deadline=None, max_examples=200)
def test_rows_of_pairs_are_never_taken_for_something_else(people, half_batch, seed):
    """Small data sets, where the same people meet often."""
    pids = np.repeat(np.arange(people), 6)
    sampler = PairSampler(pids, batch_size=2 * half_batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            drawn = torch.from_numpy(pids[list(sampler)])
            for batch in drawn.split(2 * half_batch):
                check_rows(batch)
