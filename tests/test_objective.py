"""A metric loss beside the losses of the paper: weights, miners, what is refused."""

import pytest
import torch
import torchreid
from pytorch_metric_learning import losses as metric_losses
from pytorch_metric_learning import miners

from casn_plugin import BatchPairs, CASNOutput, MetricOptions, SiameseAttentionLoss
from casn_plugin.objective import loss_terms

PIDS = torch.arange(4).repeat_interleave(4)


def output_of(features: torch.Tensor) -> CASNOutput:
    return CASNOutput(torch.randn(len(features), 4), features, torch.rand(len(features), 3, 4, 2))


def test_the_terms_are_weighted_as_torchreids():
    features = torch.randn(16, 8, requires_grad=True)
    metric = MetricOptions(0.7, 0.4, metric_loss=torchreid.losses.TripletLoss(0.3))
    ide = features.sum()
    loss, terms = loss_terms(output_of(features), PIDS, ide, metric=metric)
    triplet = torchreid.losses.TripletLoss(0.3)(features, PIDS)
    torch.testing.assert_close(loss, 0.7 * triplet + 0.4 * ide)
    assert terms["loss_t"] == triplet and terms["loss_ide"] == ide and terms["loss"] == loss
    assert not any(term.requires_grad for term in terms.values())
    gradients = [torch.autograd.grad(each, features, retain_graph=True)[0]
                 for each in (loss, triplet, ide)]  # fmt: skip
    torch.testing.assert_close(gradients[0], 0.7 * gradients[1] + 0.4 * gradients[2])


def test_what_has_no_weight_is_not_computed():
    def fail(*_):
        raise AssertionError

    features = torch.randn(16, 8)
    metric = MetricOptions(0.0, 2.0, metric_loss=fail)
    loss, terms = loss_terms(output_of(features), PIDS, torch.tensor(1.5), metric=metric)
    assert loss == 3 and "loss_t" not in terms
    metric = MetricOptions(1.0, 0.0, metric_loss=lambda features, pids: features.sum())
    loss, terms = loss_terms(output_of(features), PIDS, None, metric=metric)
    assert loss == features.sum() and "loss_ide" not in terms
    with pytest.raises(ValueError, match="expected loss_ide, as weight_x is 1.0, got None"):
        loss_terms(output_of(features), PIDS, None)


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
@pytest.mark.parametrize("loss", [metric_losses.TripletMarginLoss, metric_losses.SupConLoss,
                                  metric_losses.MultiSimilarityLoss])  # fmt: skip
def test_losses_and_miners_of_pytorch_metric_learning(loss, miner):
    features = torch.randn(16, 8, requires_grad=True)
    metric = MetricOptions(metric_loss=loss(), miner=miner)
    expected = loss()(features, PIDS, None if miner is None else miner(features, PIDS))
    assert metric.loss(features, PIDS) == expected and expected > 0
    expected.backward()
    assert features.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_metric_loss_in_float32(dtype):
    layer, imgs = torch.nn.Linear(6, 8), torch.randn(16, 6)
    metric = MetricOptions(metric_loss=torchreid.losses.TripletLoss(0.3))
    with torch.autocast("cpu", dtype=dtype):
        features = layer(imgs)
        loss = metric.loss(features, PIDS)
    assert features.dtype == dtype and loss.dtype == torch.float32
    assert loss == torchreid.losses.TripletLoss(0.3)(features.float(), PIDS)


def test_with_attention_losses_all_are_added():
    features, same = torch.randn(16, 8), torch.tensor([True, False])
    output = output_of(features)._replace(
        masked_scores=torch.rand(16), pair_scores=torch.randn(4, 2), distances=torch.rand(2),
        same=same,
    )  # fmt: skip
    metric = MetricOptions(0.5, metric_loss=metric_losses.TripletMarginLoss())
    siamese = SiameseAttentionLoss(consistency_weight=0.3, pairs=BatchPairs(2))
    loss, terms = loss_terms(
        output, PIDS, torch.tensor(1.0), lambda_ia=0.2, lambda_sa=0.6, siamese=siamese,
        metric=metric,
    )  # fmt: skip
    parts = (1.0, terms["loss_ide"]), (0.5, terms["loss_t"]), (0.2, terms["loss_ia"])
    total = sum(weight * term for weight, term in (*parts, (0.6, terms["loss_sa"])))
    torch.testing.assert_close(loss, total)
    expected = terms["loss_bce"] + 0.3 * output.distances[0]
    torch.testing.assert_close(terms["loss_sa"], expected)


def test_modules_of_the_options_are_saved_and_taken_over():
    metric = MetricOptions(metric_loss=metric_losses.ProxyAnchorLoss(4, 8))
    other = MetricOptions(metric_loss=metric_losses.ProxyAnchorLoss(4, 8))
    assert len(list(metric.modules.parameters())) == 1
    other.load(metric.modules.state_dict())
    assert torch.equal(other.metric_loss.proxies, metric.metric_loss.proxies)
    for state in ({}, MetricOptions(metric_loss=torch.nn.Linear(2, 2)).modules.state_dict()):
        with pytest.raises(ValueError, match="of another metric loss"):
            metric.load(state)
    assert len(MetricOptions(metric_loss=lambda *_: 0).modules) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_t": -1}, ValueError, "weight_t must be >= 0 and finite"),
        ({"weight_x": float("nan")}, ValueError, "weight_x must be >= 0 and finite"),
        ({"margin": float("inf")}, ValueError, "margin must be >= 0 and finite"),
        ({"weight_t": 0, "weight_x": 0}, ValueError, "one of weight_t and weight_x"),
        ({"metric_loss": "triplet"}, TypeError, "metric_loss must be called as"),
        ({"metric_loss": len, "miner": 3}, TypeError, "miner must be called as"),
        ({"metric_loss": len, "margin": 0.5}, ValueError, "has its own, got margin=0.5"),
        ({"miner": len}, ValueError, "expected a metric_loss beside it"),
    ],
)
def test_bad_options_are_refused(unchecked, options, error, message):
    with pytest.raises(error, match=message):
        MetricOptions(**options)


def test_a_metric_loss_that_is_none_is_found_out(unchecked):
    features = torch.randn(16, 8)
    with pytest.raises(ValueError, match="expected a metric_loss, got None: only the engine"):
        MetricOptions().loss(features, PIDS)
    with pytest.raises(ValueError, match="what metric_loss gives must be of shape"):
        MetricOptions(metric_loss=lambda features, pids: features).loss(features, PIDS)
    with pytest.raises(TypeError, match="what metric_loss gives must be a float tensor"):
        MetricOptions(metric_loss=lambda features, pids: 0.5).loss(features, PIDS)
    with pytest.raises(ValueError, match="features and pids must be of one length, got 16 and 3"):
        MetricOptions(metric_loss=lambda features, pids: 0.5).loss(features, PIDS[:3])
