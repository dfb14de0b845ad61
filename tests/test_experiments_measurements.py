"""What the laboratory measures of a trained model, and maps that it scales by their range."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from casn_plugin import Encoding, SiameseAttentionLoss, attention_distmat

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def options(root: Path, *more: object) -> list[str]:
    common = [
        *("--backbone", "resnet_slim", "--height", 64, "--width", 32, "--batch-size", 8),
        *("--workers", 0, "--device", "cpu", "--root", root, "--sources", "market1501", *more),
    ]
    return [str(option) for option in common]


def test_the_measurements_are_the_engines_own_figures(lab, market_root):
    protocols, measurements = lab("protocols"), lab("measurements")
    engine = protocols.build_engine(protocols.parse_args(options(market_root)))
    engine.test()
    (theirs,) = engine.results.values()
    results = measurements.measure(engine, "market1501")
    for kind in ("features", "attention", "fused"):
        assert results[kind]["mAP"] == pytest.approx(theirs[kind]["mAP"], abs=1e-5)
        assert results[kind]["mINP"] == pytest.approx(theirs[kind]["mINP"], abs=1e-5)
        assert results[kind]["rank5"] == pytest.approx(theirs[kind]["cmc"][4], abs=1e-5)
    assert results["auc"] == pytest.approx(theirs["auc"], abs=1e-5)
    assert results["fusion"]["query"]["0.0"][1] == results["features"]["mAP"]
    assert 0 < results["quality"]["siamese"]["energy"] < 1
    assert {"same", "different", "auc"} <= set(results["quality"]["siamese"])


def test_a_shortlist_is_measured_without_what_needs_all_pairs(lab, market_root):
    protocols, measurements = lab("protocols"), lab("measurements")
    engine = protocols.build_engine(protocols.parse_args(options(market_root, "--topk", 3)))
    engine.test()
    (theirs,) = engine.results.values()
    results = measurements.measure(engine, "market1501")
    for kind in ("features", "attention", "fused"):
        assert results[kind]["mAP"] == pytest.approx(theirs[kind]["mAP"], abs=1e-5)
    assert list(results["fusion"]) == ["unit"]
    assert "energy" in results["quality"]["siamese"] and "auc" not in results["quality"]["siamese"]


def test_maps_scaled_by_range_in_training_and_ranking_alike(lab):
    scaling = lab("scaling")
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.pair_classifier = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    )
    activations = torch.rand(4, 8, 6, 3, requires_grad=True)
    features = activations.mean((2, 3))
    images = Encoding(features.detach(), basis=activations.detach() / 18)

    def trained(siamese: SiameseAttentionLoss) -> tuple[Tensor, Tensor]:
        return siamese.compare(model.pair_classifier, features, activations)

    scores, distances = trained(scaling.SiameseByRange(row_threshold=0.4))
    ranked = scaling.distmat_by_range(
        model, images[::2], images[1::2], row_threshold=0.4, unit=False
    )
    torch.testing.assert_close(distances.detach(), ranked.diagonal())
    plain_scores, plain = trained(SiameseAttentionLoss(row_threshold=0.4))
    assert torch.equal(scores, plain_scores) and not torch.allclose(distances, plain)
    by_package = attention_distmat(model, images[::2], images[1::2], row_threshold=0.4)
    torch.testing.assert_close(plain.detach(), by_package.diagonal())
    assert scaling.profiles_by_range(torch.tensor([[[1.0, 2], [3, 1]]])).tolist() == [[0, 1]]

    # profiles of many images come to the same as those of a few
    many = Encoding.cat([images] * 200)
    distmat = scaling.distmat_by_range(model, images[:1], many, row_threshold=0.4, unit=True)
    torch.testing.assert_close(distmat.view(200, 4), distmat[:, :4].expand(200, 4))


def test_a_mask_of_maps_scaled_by_range(lab):
    """The greatest value of the resized map is hidden the most, the least not at all."""
    loss = lab("scaling").IdentificationByRange(mask_scale=2.0, mask_threshold=0.0, fill=1.0)
    activations = torch.rand(3, 8, 6, 3, requires_grad=True)
    logits = activations.mean((2, 3)) @ torch.rand(8, 5)
    hidden = loss.mask(torch.zeros(3, 3, 12, 6), torch.tensor([0, 1, 2]), logits, activations)
    shares = hidden.detach().logit() / 2
    torch.testing.assert_close(shares.amax((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(shares.amin((1, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    hidden.sum().backward()
    assert activations.grad.abs().sum() > 0
