"""Identities and cameras of every form, and which pairs count."""

import numpy as np
import pytest
import torch

from casn_plugin.identities import (
    as_ids,
    check_labels,
    pairs_by_identity,
    same_identity,
    split_pairs,
)


@pytest.mark.parametrize(
    "ids", [[3, 0, 7], (3, 0, 7), np.array([3, 0, 7], np.uint8), torch.tensor([3, 0, 7])]
)
def test_identities_may_be_of_any_integer_kind(ids):
    assert as_ids("pids", ids).tolist() == [3, 0, 7]
    assert as_ids("pids", ids, 3).dtype == np.int64


def test_what_is_unknown_is_minus_one():
    assert as_ids("pids", [3, None, -1]).tolist() == [3, -1, -1]
    assert as_ids("camids", None, 2).tolist() == [-1, -1] and as_ids("pids", []).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "pids must be integers, got float64"),
        (["7", "8"], TypeError, "pids must be integers, got <U1"),
        (np.array([True]), TypeError, "got bool"),
        (torch.tensor([1.5]), TypeError, "got float32"),
        ([-2, 1], ValueError, "pids must be >= 0, or -1 where unknown, got -2"),
        ([[1, 2]], ValueError, r"of one dimension, one an image, got shape \(1, 2\)"),
    ],
)
def test_other_identities_are_refused(unchecked, ids, error, message):
    with pytest.raises(error, match=message):
        as_ids("pids", ids)


def test_labels_are_the_classes_of_the_classifier():
    assert check_labels("pids", [1, 0, 1, 2]).tolist() == [1, 0, 1, 2]
    for pids, classes, message in (
        ([1, 2, 3], None, "got 3 from 1 to 3; 3 is no class"),
        ([0, 2], None, "got 2 from 0 to 2; 2 is no class"),
        ([0, 1, -1], None, "got 3 from -1 to 1; -1 is no class"),
        ([0, 1], 3, "classes 0 ... 2 .* got 2 from 0 to 1; 2 is missing"),
        ([0, 1, 2], 2, "got 3 from 0 to 2; 2 is no class"),
    ):
        with pytest.raises(ValueError, match=message):
            check_labels("pids", pids, classes)


def test_pairs_count_as_ranking_counts_them():
    q, g = ([7, -1, 8], [0, 1, -1]), ([7, 7, 8, None, 5], [0, 1, -1, 2, 2])
    same, counted = pairs_by_identity(q[0], g[0], q[1], g[1], junk_pids=[5])
    for i, (pid, camid) in enumerate(zip(*q, strict=True)):
        for j, (other, where) in enumerate(zip(*g, strict=True)):
            known = pid not in (-1, None) and other not in (-1, None)
            assert same[i, j] == (known and pid == other)
            own = pid == other and camid == where and where != -1
            assert counted[i, j] == (known and not own and other != 5)
    _, counted = pairs_by_identity(q[0], g[0], q[1], g[1], cross_camera=False)
    assert counted[0].tolist() == [True, True, True, False, True]


def test_split_pairs_needs_an_even_batch():
    with pytest.raises(ValueError, match="even.*has 3"):
        split_pairs(torch.rand(3, 2))


def test_whether_strangers_are_one_person_is_unknown():
    pids = torch.tensor([0, 0, -1, -1, 2, -1])
    with pytest.raises(ValueError, match="in 2 of 3 pairs one is unknown"):
        same_identity(pids)
    chosen = same_identity(pids, torch.tensor([[0, 1], [0, 4]]))  # of known ones
    assert chosen.tolist() == [True, False]
