"""Each loss against the reference, and as a part of somebody else's training loop."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import PROGRAMS, TinyBackbone, tiny_forward
from torch import nn
from torch.utils.checkpoint import checkpoint

from casn_plugin import IdentificationAttentionLoss, PairClassifier, SiameseAttentionLoss
from casn_plugin.attention import grad_cam
from casn_plugin.hooks import capture
from casn_plugin.identities import same_identity
from casn_plugin.losses import (
    casn_loss,
    consistency,
    identification_attention_loss,
    identification_loss,
    pair_loss,
    siamese_attention_loss,
)
from casn_plugin.scores import SCORES, identity_scores

PIDS = torch.tensor([0, 0, 3, 4])


def test_identification_loss_agrees_with_the_reference():
    logits, pids = torch.randn(4, 5, dtype=torch.float64), PIDS
    expected = reference.cross_entropy(logits.numpy(), pids.tolist(), 0.1)
    assert identification_loss(logits, pids, label_smoothing=0.1).item() == pytest.approx(expected)
    parts = [logits, 2 * logits]
    both = (expected + reference.cross_entropy(2 * logits.numpy(), pids.tolist(), 0.1)) / 2
    assert identification_loss(parts, pids, label_smoothing=0.1).item() == pytest.approx(both)


@pytest.mark.parametrize("bad", [-100, -1, 5, -(2**63)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identities_that_are_no_class_are_refused(bad, smoothing):
    """-100 is what PyTorch leaves out in silence."""
    logits, pids = torch.randn(4, 5), torch.tensor([0, 1, bad, 4])
    for each in (logits, [logits, logits]):
        with pytest.raises(ValueError, match=r"^pids must lie in \[0, 5\), .* from .*"):
            identification_loss(each, pids, label_smoothing=smoothing)


@pytest.mark.parametrize("score", SCORES)
def test_identification_attention_loss_agrees_with_the_reference(score):
    logits = torch.randn(4, 5, dtype=torch.float64)
    expected = reference.identification_attention_loss(logits.numpy(), PIDS.tolist(), score)
    loss = identification_attention_loss(identity_scores(logits, PIDS, score))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("score", SCORES)
def test_only_the_logit_moves_with_all_logits_of_an_image(score):
    """What Eq. 1 does not see, a reading of Eq. 2 can't be lowered by, but for the logit."""
    logits, pids = torch.randn(4, 5, dtype=torch.float64), PIDS
    moved = identity_scores(logits - 3, pids, score)
    expected = identity_scores(logits, pids, score) - (3 if score == "logit" else 0)
    torch.testing.assert_close(moved, expected)


def test_readings_of_the_score_where_it_is_sure_and_where_it_guesses():
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    found = identity_scores(sure, torch.tensor([0]), "log-odds")
    assert found.item() == pytest.approx(60 - math.log(2))  # log(1 - p) alone would be -inf
    (gradient,) = torch.autograd.grad(found.sum(), sure)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))
    guessing = torch.tensor([[-1.0, 0.0, 0.0]], requires_grad=True)
    found = identity_scores([guessing, sure], torch.tensor([0]), "above-chance")
    assert found.item() == pytest.approx(math.log(3) / 2)  # one part guesses, the other is sure
    (gradient,) = torch.autograd.grad(found.sum(), guessing)
    assert not gradient.any()
    two = identity_scores(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), "log-odds")
    assert two.item() == pytest.approx(-2)
    with pytest.raises(ValueError, match="^log-odds need two classes or more, got logits of 1"):
        identity_scores(torch.zeros(2, 1), torch.tensor([0, 0]), "log-odds")


def test_identity_scores_of_parts_are_summed_as_logits_and_averaged_as_probabilities():
    parts = [torch.randn(4, 5), torch.randn(4, 5)]
    each = torch.stack([part[torch.arange(4), PIDS] for part in parts])
    torch.testing.assert_close(identity_scores(parts, PIDS), each.sum(0))
    shares = torch.stack([part.softmax(1)[torch.arange(4), PIDS] for part in parts])
    torch.testing.assert_close(identity_scores(parts, PIDS, "probability"), shares.mean(0))
    half = identity_scores([part.half() for part in parts], PIDS, "probability")
    assert half.dtype == torch.float32


def test_pair_and_siamese_losses_agree_with_the_reference():
    scores, distances = torch.randn(6, 2, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    same = torch.tensor([True, False, True, True, False, False])
    arrays = scores.numpy(), distances.numpy(), same.tolist()
    assert pair_loss(scores, same).item() == pytest.approx(
        reference.pair_loss(arrays[0], arrays[2])
    )
    expected = reference.siamese_attention_loss(*arrays, 0.7)
    loss = siamese_attention_loss(scores, distances, same, consistency_weight=0.7)
    assert loss.item() == pytest.approx(expected)
    both = torch.stack([scores, scores], dim=1).flatten(0, 1)  # both orders of each pair
    loss = siamese_attention_loss(both, distances, same, consistency_weight=0.7)
    assert loss.item() == pytest.approx(expected)


def test_casn_loss_agrees_with_the_reference():
    terms = [torch.rand(()) for _ in range(3)]
    expected = reference.casn_loss(*(term.item() for term in terms), 0.5, 0.05)
    assert casn_loss(*terms).item() == pytest.approx(expected)


def test_no_valid_pair_gives_a_zero_attached_to_the_graph():
    distances = torch.rand(3, requires_grad=True)
    loss = consistency(distances, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and distances.grad.tolist() == [0, 0, 0]
    scores = torch.rand(0, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.bool)
    loss = siamese_attention_loss(scores, torch.rand(0), none)
    loss.backward()
    assert loss.item() == 0
    scores = torch.rand(0, requires_grad=True)
    identification_attention_loss(scores).backward()


def test_distances_of_negative_pairs_do_not_count():
    distances = torch.tensor([1.0, float("nan")])
    assert consistency(distances, torch.tensor([True, False])).item() == 1


def test_the_masked_image_agrees_with_the_reference():
    backbone, imgs = TinyBackbone().double().eval(), torch.rand(4, 3, 48, 24).double()
    with capture(backbone.features) as captured:
        logits, _ = tiny_forward(backbone, imgs)
    loss = IdentificationAttentionLoss(mask_scale=6.0, mask_threshold=0.3, fill=0.7)
    masked = loss.mask(imgs, PIDS, logits, captured.require()).detach()
    for i in range(4):
        map_ = reference.grad_cam(logits[i, PIDS[i]], captured.require(), i).numpy()
        mask = reference.soft_mask(map_, 48, 24, 6.0, 0.3)
        expected = reference.masked_image(imgs[i].numpy(), mask, 0.7)
        np.testing.assert_allclose(masked[i], expected, rtol=0, atol=1e-12)
    coloured = IdentificationAttentionLoss(fill=torch.rand(3, 1, 1)).double()
    assert "fill" not in coloured.state_dict()
    assert coloured.mask(imgs, PIDS, logits, captured.require()).shape == imgs.shape


def test_the_masked_pass_keeps_batchnorm_statistics_and_trains_the_map():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    imgs = torch.rand(4, 3, 48, 24)
    with capture(net[2]) as captured:
        logits = net(imgs)
    before = net[1].running_mean.clone()
    loss = IdentificationAttentionLoss("logit")(net, imgs, PIDS, logits, captured.require())
    torch.testing.assert_close(net[1].running_mean, before, rtol=0, atol=0)
    frozen = [parameter.detach().clone() for parameter in net.parameters()]

    def classify(masked):  # the same network with constant weights: what is left goes by the map
        constant = dict(zip(dict(net.named_parameters()), frozen, strict=True))
        return torch.func.functional_call(net, constant, (masked,))

    loss = IdentificationAttentionLoss("logit", trains="network")(
        classify, imgs, PIDS, logits, captured.require()
    )
    gradients = torch.autograd.grad(loss, [net[0].weight, net[5].weight])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize(("trains", "whole"), [("attention", True), ("attention", False),
                                               ("network", True), ("network", False)])  # fmt: skip
def test_what_the_masked_pass_trains_and_normalises_by(trains, whole, statistics):
    """Against the same network again, with weights of its own or constant ones."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).double()  # fmt: skip
    net[1].running_var.fill_(0.5)
    imgs = torch.rand(4, 3, 48, 24).double()
    with capture(net[2]) as captured:
        logits = net(imgs)
    settings = IdentificationAttentionLoss("logit", trains=trains, statistics=statistics)
    twin = copy.deepcopy(net).requires_grad_(trains == "network")
    twin[1].train(statistics == "batch")
    masked = settings.mask(imgs, PIDS, logits, captured.require())
    expected = identity_scores(twin(masked), PIDS).mean()
    loss = settings(
        *(net if whole else net.forward, imgs, PIDS, logits, captured.require()),
        network=None if whole else net,
    )
    torch.testing.assert_close(loss, expected)
    weights = list(net.parameters())
    through_mask = torch.autograd.grad(expected, weights, retain_graph=True, allow_unused=True)
    through_pass = [0.0] * len(weights)
    if trains == "network":
        through_pass = torch.autograd.grad(expected, list(twin.parameters()))
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for gradient, *both in zip(gradients, through_mask, through_pass, strict=True):
        total = sum(0.0 if part is None else part for part in both)
        torch.testing.assert_close(gradient if gradient is not None else 0.0, total)
    assert gradients[0].abs().max() > 0


def test_swapping_a_pair_changes_neither_score_sum_nor_distance():
    """With both orders shown, the two images of a pair may change places."""
    activations = torch.rand(4, 8, 6, 3, dtype=torch.float64, requires_grad=True)
    classifier = PairClassifier(8).double()
    loss = SiameseAttentionLoss(consistency_weight=0.0)
    first = loss(classifier, activations.mean((2, 3)), PIDS, activations)
    order = [1, 0, 3, 2]
    swapped = activations.detach()[order].requires_grad_()
    second = loss(classifier, swapped.mean((2, 3)), PIDS[order], swapped)
    assert first.item() == pytest.approx(second.item(), abs=1e-12)
    one = SiameseAttentionLoss(both_orders=False)
    scores, distances = one.compare(classifier, activations.mean((2, 3)), activations)
    assert scores.shape == (2, 2) and distances.shape == (2,)


def test_blank_maps_give_finite_gradients():
    activations = torch.zeros(4, 8, 6, 3, requires_grad=True)
    classifier = PairClassifier(8)
    loss = SiameseAttentionLoss()(classifier, activations.mean((2, 3)), PIDS, activations)
    loss.backward()
    assert loss.isfinite() and activations.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_under_autocast(dtype):
    backbone, classifier = TinyBackbone(), PairClassifier(6)
    imgs = torch.rand(4, 3, 48, 24)
    with torch.autocast("cpu", dtype=dtype):
        with capture(backbone.features) as captured:
            logits, features = tiny_forward(backbone, imgs)
        loss = IdentificationAttentionLoss()(
            lambda masked: tiny_forward(backbone, masked)[0],
            imgs,
            PIDS,
            logits,
            captured.require(),
            backbone,
        ) + SiameseAttentionLoss()(classifier, features, PIDS, captured.require())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)
    assert backbone.features[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_with_checkpointing_inside_is_refused_and_a_module_is_not(reentrant):
    class Lean(TinyBackbone):
        def forward(self, imgs):
            maps = checkpoint(self.features, imgs, use_reentrant=reentrant)
            return self.classifier(self.embed(self.relu(maps).mean((2, 3))))

    net, imgs = Lean(), torch.rand(4, 3, 48, 24)
    norm = net.features[1]
    with capture(net.features) as captured:
        logits, _ = tiny_forward(net, imgs)
    arguments = imgs, PIDS, logits, captured.require()
    loss = IdentificationAttentionLoss()
    message = "gradient checkpointing .* give the network itself as classify"
    with pytest.raises(ValueError, match=message):
        loss(lambda masked: net(masked), *arguments, net)
    assert not net.features._forward_pre_hooks
    loss(net, *arguments).backward()
    assert norm.num_batches_tracked == 1 and net.features[0].weight.grad.abs().max() > 0


def test_a_training_loop_of_ones_own_without_torchreid():
    """The losses in a plain loop: L falls, attention is trained, and torchreid is not imported."""
    program = PROGRAMS / "own_training_loop.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_input_says_what_was_expected(unchecked):
    activations = torch.rand(3, 8, 6, 3, requires_grad=True)
    with pytest.raises(ValueError, match="even"):
        SiameseAttentionLoss()(PairClassifier(8), activations.mean((2, 3)), PIDS[:3], activations)
    with pytest.raises(ValueError, match=r"pids must lie in \[0, 4\)"):
        identity_scores(torch.rand(4, 4), PIDS)
    with pytest.raises(ValueError, match="^score must be .* got 'odds'"):
        identity_scores(torch.rand(4, 5), PIDS, "odds")
    with pytest.raises(ValueError, match="of one length, got 5 and 4"):
        identity_scores(torch.rand(5, 5), PIDS)
    with pytest.raises(TypeError, match="^logits must be"):
        identity_scores(torch.ones(4, 5, dtype=torch.int64), PIDS)
    with pytest.raises(TypeError, match="^pids must be"):
        identity_scores(torch.rand(4, 5), PIDS.float())
    with pytest.raises(ValueError, match=r"^logits must be a \(B, classes\) tensor"):
        identity_scores([torch.rand(4, 5), torch.rand(4, 6)], PIDS)
    with pytest.raises(ValueError, match="'log-odds' or 'above-chance', got 'loss'"):
        IdentificationAttentionLoss("loss")
    with pytest.raises(ValueError, match="'network' or 'attention', got 'all'"):
        IdentificationAttentionLoss(trains="all")
    with pytest.raises(ValueError, match="'batch' or 'running', got 'own'"):
        IdentificationAttentionLoss(statistics="own")
    with pytest.raises(TypeError, match="name it, network=.*none but a function"):
        IdentificationAttentionLoss(trains="attention")(
            lambda masked: masked.mean((2, 3)), activations, PIDS[:3], PIDS[:3], activations
        )
    with pytest.raises(ValueError, match="mask_scale must be positive, got 0"):
        IdentificationAttentionLoss(mask_scale=0)
    with pytest.raises(ValueError, match=r"row_threshold must lie in \[0, 1\), got 1"):
        SiameseAttentionLoss(row_threshold=1.0)
    with pytest.raises(ValueError, match=r"logits must be .* got shapes \[\(3,\)\]"):
        identification_loss(torch.rand(3), PIDS)
    with pytest.raises(ValueError, match="even"):
        same_identity(PIDS[:1])


def test_grad_cam_of_summed_parts_is_that_of_the_summed_score():
    activations = torch.rand(2, 3, 4, 4, requires_grad=True)
    heads = [nn.Linear(3, 5), nn.Linear(3, 5)]
    logits = [head(activations.mean((2, 3))) for head in heads]
    pids = torch.tensor([1, 2])
    together = grad_cam(identity_scores(logits, pids), activations)
    summed = grad_cam(sum(part[torch.arange(2), pids] for part in logits), activations)
    torch.testing.assert_close(together, summed)


def test_settings_are_those_of_the_paper_unless_others_are_given():
    logits, terms = torch.randn(4, 5, dtype=torch.float64), [torch.rand(()) for _ in range(3)]
    for smoothing, given in ((0.0, {}), (1.0, {"label_smoothing": 1.0})):
        expected = reference.cross_entropy(logits.numpy(), PIDS.tolist(), smoothing)
        assert identification_loss(logits, PIDS, **given).item() == pytest.approx(expected)
    scores, distances = torch.randn(2, 2, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    same = torch.tensor([True])
    for rows in (scores[:1], scores):  # a pair alone, in one order and in both
        orders = [bool(each) for each in same.repeat_interleave(len(rows))]
        expected = reference.pair_loss(rows.numpy(), orders) + 0.2 * distances.item()
        loss = siamese_attention_loss(rows, distances, same)
        assert loss.item() == pytest.approx(expected)
    expected = reference.casn_loss(*(term.item() for term in terms), 0.5, 0.05)
    assert casn_loss(*terms).item() == pytest.approx(expected)
    loss = IdentificationAttentionLoss()
    assert (loss.score, loss.trains, loss.statistics) == ("probability", "attention", "batch")
    assert (loss.mask_scale, loss.mask_threshold, loss.fill) == (10, 0.5, 0)


def test_no_image_gives_a_zero():
    assert identification_attention_loss(torch.rand(0)).item() == 0


@pytest.mark.parametrize("score", SCORES)
def test_masked_images_are_scored_as_they_are_asked_for_whatever_runs_them(score):
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net, imgs = net.double(), torch.rand(4, 3, 48, 24).double()
    with capture(net[0]) as captured:
        logits = net(imgs)
    given = imgs, PIDS, logits, captured.require()
    for trains, network in (("network", None), ("network", net), ("attention", net)):
        loss = IdentificationAttentionLoss(score, trains=trains)
        expected = identity_scores(net(loss.mask(*given)), PIDS, score).mean()
        torch.testing.assert_close(loss(net.forward, *given, network), expected)
        torch.testing.assert_close(loss(net, *given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masked_images_are_of_the_numbers_that_the_images_are_of(dtype):
    """Whatever those of the maps, which are float32 or wider, and of the fill are."""
    net, fill = nn.Conv2d(3, 5, 3), torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    imgs = torch.rand(2, 3, 16, 8)
    activations = net(imgs)
    given = PIDS[2:], activations.mean((2, 3)), activations
    loss = IdentificationAttentionLoss(fill=fill.double())
    masked = loss.mask(imgs.to(dtype), *given)
    assert masked.dtype == dtype and "fill" not in loss.state_dict()
    torch.testing.assert_close(masked.float(), loss.mask(imgs, *given), rtol=0, atol=0.02)
