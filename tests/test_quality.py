"""Attention's quality, pixel by pixel, and its consistency, pair by pair."""

import numpy as np
import pytest
import reference
import torch

from casn_plugin.quality import attention_consistency, attention_quality


@pytest.mark.parametrize("size", [(8, 4), (12, 7), (5, 3), (2, 2)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64])
def test_attention_quality_equals_loops_over_pixels(size, kind):
    maps = (torch.rand(40, 4, 2) - 0.3).relu() * 7
    maps[0], maps[1] = 0, 1e-30
    masks = torch.rand(40, *size)
    masks[2], masks[3], masks[4, size[0] // 2 :] = 0, 1, 0
    masks = masks > 0.5 if kind is torch.bool else masks.to(kind)
    found = attention_quality(maps, masks, pixel_threshold=0.4, row_threshold=0.25)
    expected = [
        reference.attention_quality(*images, 0.4, 0.25)
        for images in zip(maps.double().numpy(), masks.double().numpy(), strict=True)
    ]
    expected[1] = (np.nan,) * 4  # as good as blank
    assert [np.isnan(row).any() for row in expected].count(True) >= 3
    for values, column in zip(vars(found).values(), np.transpose(expected), strict=True):
        np.testing.assert_allclose(values, column, rtol=1e-5)


def test_attention_quality_of_perfect_and_of_missing_attention():
    person = torch.zeros(2, 6, 3, dtype=torch.bool)
    person[:, 1:4, 1] = True
    found = attention_quality(torch.stack([person[0], ~person[0]]).float(), person)
    assert [values.tolist() for values in vars(found).values()] == [[1, 0], [1, 0], [1, 0], [1, 1]]
    at = torch.tensor([[[1.0], [0.5]]])  # a value at the threshold is not above it
    found = attention_quality(at, torch.ones_like(at), pixel_threshold=0.5, row_threshold=0.5)
    assert (found.iou.item(), found.coverage.item()) == (0.5, 0.5)
    for scale in (1e-3, 1e3):  # only the shape of a map counts
        maps = torch.rand(2, 3, 2)
        one, other = attention_quality(maps, person), attention_quality(maps * scale, person)
        torch.testing.assert_close(vars(one), vars(other))
    assert attention_quality(torch.zeros(0, 3, 2), torch.zeros(0, 6, 3)).iou.shape == (0,)


@pytest.mark.parametrize(
    ("maps", "masks", "options", "message"),
    [
        (torch.ones(2, 3, 2), torch.ones(1, 6, 4), {}, r"got \(2, 3, 2\) and \(1, 6, 4\)"),
        (torch.ones(3, 2), torch.ones(3, 6, 4), {}, r"got \(3, 2\) and \(3, 6, 4\)"),
        (-torch.ones(2, 3, 2), torch.ones(2, 6, 4), {}, "maps must be finite and >= 0"),
        (torch.full((2, 3, 2), torch.inf), torch.ones(2, 6, 4), {}, "maps must be finite"),
        (torch.ones(2, 3, 2), torch.full((2, 6, 4), torch.nan), {}, r"masks must be in \[0, 1\]"),
        (torch.ones(2, 3, 2), torch.full((2, 6, 4), 255), {}, r"masks must be in \[0, 1\]"),
        (torch.ones(2, 0, 2), torch.ones(2, 6, 4), {}, "maps must have at least one cell"),
        (torch.ones(2, 3, 2), torch.ones(2, 6, 0), {}, "masks must have at least one cell"),
        (
            torch.ones(2, 3, 2),
            torch.ones(2, 6, 4),
            {"pixel_threshold": 1},
            "pixel_threshold must lie in",
        ),
        (torch.ones(2, 3, 2), torch.ones(2, 6, 4), {"row_threshold": -1}, "got -1"),
    ],
)
def test_attention_quality_refuses_bad_input(unchecked, maps, masks, options, message):
    with pytest.raises(ValueError, match=message):
        attention_quality(maps, masks, **options)


def test_attention_consistency_counts_pairs(unchecked):
    distances, same = torch.rand(5, 6), torch.rand(5, 6) > 0.5
    found = attention_consistency(distances, same)
    assert found.same == pytest.approx(distances[same].mean().item())
    assert found.different == pytest.approx(distances[~same].mean().item())
    nearer = [
        float(one < other)
        for one in distances[same].tolist()
        for other in distances[~same].tolist()
    ]
    assert found.auc == pytest.approx(np.mean(nearer))
    only = attention_consistency(distances, torch.ones_like(same))
    assert only.same == pytest.approx(distances.mean().item())
    assert np.isnan(only.different) and np.isnan(only.auc)
    with pytest.raises(ValueError, match=r"got \(5, 6\) and \(5,\)"):
        attention_consistency(distances, same[:, 0])
    for bad in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="distances must be >= 0"):
            attention_consistency(torch.full((5, 6), bad), same)
