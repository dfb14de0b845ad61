"""Whether attention marks what decides: planted evidence, loops, and pytorch-grad-cam's metric."""

import numpy as np
import pytest
import reference
import torch
from conftest import state_of
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from torch import nn

from casn_plugin import CASN, Similarity
from casn_plugin.faithfulness import (
    SHARES,
    centre_prior,
    faithfulness,
    pair_faithfulness,
    pixel_ranks,
)
from casn_plugin.ranking import pair_attention

SIZE = (32, 16)
CELL = (1, 2)  # of the 8 x 4 cells of the map


def inside(imgs: torch.Tensor) -> torch.Tensor:
    """What is seen of images in the one cell that decides."""
    row, column = 4 * CELL[0], 4 * CELL[1]
    return imgs[:, :, row : row + 4, column : column + 4]


class Masked(nn.Module):
    """Lets one cell through."""

    def forward(self, maps):
        return maps.relu() * planted(1)


class Patch(nn.Sequential):
    """Its features are what it sees in one cell, and nothing else."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 4, 4), Masked())


def model_of(evidence=None, **options) -> CASN:
    torch.manual_seed(0)
    model = CASN(
        Patch(), forward=lambda net, imgs: (None, net(imgs).mean((2, 3))), input_size=SIZE,
        pair_classifier=evidence or nn.Linear(4, 2), **options,
    )  # fmt: skip
    return model.eval()


def planted(number: int) -> torch.Tensor:
    maps = torch.zeros(number, 8, 4)
    maps[:, CELL[0], CELL[1]] = 1
    return maps


def brightness(imgs: torch.Tensor) -> torch.Tensor:
    return inside(imgs).mean((1, 2, 3))


def lit(number: int = 3) -> torch.Tensor:
    """Noise, bright in the cell that decides."""
    imgs = 0.1 * torch.randn(number, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    inside(imgs).add_(1)
    return imgs


def test_planted_evidence_is_near_its_optimum_and_chance_is_not():
    imgs = lit(40)
    fine = torch.zeros(40, *SIZE)
    inside(fine[:, None]).fill_(1)
    shares = [0.0, 1 / 32, *np.linspace(0.1, 1, 10).tolist()]
    best = faithfulness(brightness, imgs, fine, shares=shares, fill="mean")
    whole, gone = best.deletion[:, :1], best.deletion[:, -1:]
    assert (whole - gone).min() > 0.8
    torch.testing.assert_close(best.deletion[:, 1:], gone.expand(-1, 11), atol=1e-4, rtol=0)
    torch.testing.assert_close(best.insertion[:, 1:], whole.expand(-1, 11), atol=1e-4, rtol=0)
    optimum = (1 - 1 / 32) * (whole - gone)[:, 0]
    torch.testing.assert_close(best.gap, optimum, atol=1e-3, rtol=0)
    coarse = faithfulness(brightness, imgs, planted(40), shares=shares, fill="mean")
    blank = faithfulness(brightness, imgs, torch.zeros(40, 8, 4), shares=shares, fill="mean")
    wrong = faithfulness(brightness, imgs, 1 - planted(40), shares=shares, fill="mean")
    centre = faithfulness(brightness, imgs, centre_prior(40, SIZE), shares=shares, fill="mean")
    assert (coarse.gap > 0.85 * optimum).all() and (wrong.gap < -0.85 * optimum).all()
    assert blank.gap.mean().abs() < 0.05 * optimum.mean()
    assert (centre.gap < 0.5 * optimum).all()


@pytest.mark.parametrize("fill", ["neighbours", "mean"])
def test_imputed_pixels_say_nothing_of_what_was_there(fill):
    found = faithfulness(brightness, lit(), planted(3), fill=fill)
    assert (found.gap > 0.5).all() and (found.deletion[:, 2:] < 0.5).all()


def test_the_gap_of_chance_is_zero_however_curved_the_scores_are():
    imgs = torch.ones(300, 3, *SIZE)

    def steep(imgs):  # falls with the first pixels that go
        return (40 * (imgs.mean((1, 2, 3)) - 1)).exp()

    black = torch.zeros(3)
    found = faithfulness(steep, imgs, torch.zeros(300, 8, 4), fill=black)
    assert found.gap.abs().max() < 1e-5 and found.deletion_area.min() > 0.02


def test_curves_are_those_of_a_loop():
    imgs, generator = lit(2), torch.Generator().manual_seed(2)
    maps = torch.rand(2, *SIZE, generator=generator)
    found = faithfulness(brightness, imgs, maps, fill="mean")
    for i in range(2):
        flat = np.argsort(-maps[i].numpy().ravel(), kind="stable")
        order = [divmod(int(place), SIZE[1]) for place in flat]
        expected = reference.removal_curves(
            lambda img: float(brightness(torch.from_numpy(img)[None])), imgs[i].numpy(), order,
            SHARES,
        )  # fmt: skip
        np.testing.assert_allclose(found.deletion[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(found.insertion[i], expected[1], atol=1e-5)
        area = np.trapezoid if hasattr(np, "trapezoid") else np.trapz
        assert found.deletion_area[i] == pytest.approx(area(expected[0], SHARES), abs=1e-5)
        assert found.insertion_area[i] == pytest.approx(area(expected[1], SHARES), abs=1e-5)


def test_single_images_score_as_with_pytorch_grad_cam():
    """Its ROAD metric, up to the noise of both and a pixel at the threshold."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(420, 5)).eval()
    net[3].weight.data.mul_(20)
    imgs, maps = lit(), torch.rand(3, *SIZE)
    found = faithfulness(
        lambda imgs: net(imgs)[:, 2].detach(), imgs, maps, shares=(0.0, 0.1, 0.3, 0.7, 0.9, 1.0)
    )
    targets = [lambda output: output[2]] * 3
    for column, share in ((1, 0.1), (2, 0.3), (3, 0.7), (4, 0.9)):
        for metric, scores in (
            (ROADMostRelevantFirst(100 - 100 * share), found.deletion[:, column]),
            (ROADLeastRelevantFirst(100 * share), found.insertion[:, column]),
        ):
            theirs = metric(imgs, maps.numpy(), targets, net, return_diff=False)
            np.testing.assert_allclose(scores, theirs, atol=0.2)
    assert found.deletion.std() > 0.2


@pytest.mark.parametrize("evidence", [None, Similarity()], ids=["pair classifier", "similarity"])
def test_pairs_lose_pixels_of_either_picture(evidence):
    model = model_of(evidence)
    first, second = lit(), lit(5)[2:]
    before = state_of(model)
    found = pair_faithfulness(model, first, second, planted(3), planted(3), fill="mean")
    assert state_of(model) == before

    def scores(one, other):
        f1, f2 = (model.encode(imgs).features for imgs in (one, other))
        z = model.pair_classifier(f1, f2) if evidence else model.pair_classifier(f1 - f2)
        return (z if evidence else z[:, 1] - z[:, 0]).detach()

    mean = [imgs.mean((2, 3), keepdim=True).expand_as(imgs) for imgs in (first, second)]
    for side, one, other in (
        ("query", mean[0], second), ("gallery", first, mean[1]), ("both", *mean),
    ):  # fmt: skip
        curves = found.evidence[side]
        for column, expected in ((0, scores(first, second)), (-1, scores(one, other))):
            torch.testing.assert_close(curves.deletion[:, column], expected)
            torch.testing.assert_close(curves.insertion[:, -1 - column], expected)
        unit = [nn.functional.normalize(model.encode(each).features) for each in (one, other)]
        closeness = -(unit[0] - unit[1]).norm(dim=1)
        torch.testing.assert_close(found.closeness[side].deletion[:, -1], closeness)


def test_attention_of_pairs_beats_chance_on_planted_evidence():
    """More of anything in the query speaks for "same" here."""
    model = model_of()
    model.backbone[0].weight.data.abs_()
    model.pair_classifier.weight.data = torch.tensor([[0.0] * 4, [1.0] * 4])
    first, second = lit(8), lit(16)[8:]
    maps = pair_attention(model, model.encode(first), model.encode(second))
    gaps = {
        name: pair_faithfulness(model, first, second, *both, seed=3).evidence["query"].gap.mean()
        for name, both in (("own", maps), ("blank", [torch.zeros(8, 8, 4)] * 2))
    }
    best = pair_faithfulness(model, first, second, planted(8), planted(8), seed=3)
    assert gaps["own"] == pytest.approx(float(best.evidence["query"].gap.mean()), rel=0.05)
    assert gaps["own"] > 2 * abs(gaps["blank"])


def test_the_flipped_image_counts_where_the_model_flips():
    model, imgs = model_of(), lit()
    plain = pair_faithfulness(model, imgs, imgs.roll(1, 0), planted(3), planted(3))
    model.flip = True
    flipped = pair_faithfulness(model, imgs, imgs.roll(1, 0), planted(3), planted(3))
    features = model.encode(imgs).features
    z = model.pair_classifier(features - features.roll(1, 0)).detach()
    found = flipped.evidence["both"].deletion[:, 0]
    torch.testing.assert_close(found, z[:, 1] - z[:, 0])
    assert not torch.allclose(found, plain.evidence["both"].deletion[:, 0])


def test_ranks_order_pixels_and_draw_among_equals():
    maps = torch.tensor([[[0.0, 3.0], [1.0, 2.0]]])
    assert pixel_ranks(maps, (2, 2)).tolist() == [[[3, 0], [2, 1]]]
    one, same, other = (pixel_ranks(torch.ones(1, 8, 4), SIZE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert sorted(one.flatten().tolist()) == list(range(512))
    assert one.flatten().tolist() != list(range(512))


def test_batches_do_not_matter_and_seeds_do():
    model, imgs = model_of(), lit()
    maps = [torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    given = (model, imgs, imgs.roll(1, 0), *maps)
    one, two, other = (
        pair_faithfulness(*given, **options).evidence["both"].deletion
        for options in ({}, {"batch_size": 2}, {"seed": 9})
    )
    torch.testing.assert_close(one, two)
    assert not torch.equal(one, other)


def test_training_mode_is_left_as_found_and_makes_no_difference():
    model, imgs, maps = model_of(), lit(), planted(3)
    model.backbone.append(nn.BatchNorm2d(4))
    quiet = pair_faithfulness(model.eval(), imgs, imgs.flip(0), maps, maps)
    model.train()
    before = state_of(model)
    found = pair_faithfulness(model, imgs, imgs.flip(0), maps, maps)
    assert torch.equal(found.evidence["both"].deletion, quiet.evidence["both"].deletion)
    assert model.training and state_of(model) == before


def test_wrong_arguments(unchecked):
    imgs, maps = lit(), planted(3)
    for shares in ((0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0,), (0, float("nan"), 1)):
        with pytest.raises(ValueError, match="shares must ascend from 0 to 1"):
            faithfulness(brightness, imgs, maps, shares=shares)
    with pytest.raises(ValueError, match="score must give one number an image"):
        faithfulness(lambda imgs: imgs.mean(), imgs, maps)
    with pytest.raises(ValueError, match="scores must be finite"):
        faithfulness(lambda imgs: torch.full((3,), torch.nan), imgs, maps)
    with pytest.raises(ValueError, match="must be of one length"):
        faithfulness(brightness, imgs, maps[:2])
    model = model_of()
    with pytest.raises(TypeError, match="model must be a CASN"):
        pair_faithfulness(Patch(), imgs, imgs, maps, maps)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        pair_faithfulness(model, imgs, imgs, maps, maps, batch_size=0)
    with pytest.raises(ValueError, match="must be of one length"):
        pair_faithfulness(model, imgs, imgs[:2], maps, maps)
    with pytest.raises(ValueError, match="maps must be of shape"):
        faithfulness(brightness, imgs, maps[:, 0])
