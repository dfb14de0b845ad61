"""L_sa of pairs that are chosen inside of a batch: against the reference, and against rows."""

import pytest
import reference
import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn

from casn_plugin import CASN, BatchPairs, PairClassifier, SiameseAttentionLoss
from casn_plugin.attention import siamese_attention
from casn_plugin.identities import split_pairs
from casn_plugin.objective import loss_terms

PK = torch.arange(4).repeat_interleave(4)
CAMIDS = torch.arange(4).repeat(4)
LOOK = {"consistency_weight": 0.7, "row_threshold": 0.3}


class Batch:
    """A batch on its way through a head of two layers, in float64."""

    def __init__(self, images: int = 16) -> None:
        self.activations = torch.rand(images, 8, 6, 3, dtype=torch.float64)
        self.activations.requires_grad_()
        embed = nn.Sequential(nn.Linear(8, 7), nn.Tanh()).double()
        self.head = lambda maps: embed(maps.relu().mean((2, 3)))
        self.features = self.head(self.activations)
        self.classifier = PairClassifier(7, 16).double()
        self.leaves = [self.activations, *embed.parameters(), *self.classifier.parameters()]

    def loss(self, siamese, pids, camids=None):
        return siamese(self.classifier, self.features, pids, self.activations, camids)


@pytest.mark.parametrize("number", [1, 5, 8, 40, "all"])
def test_agrees_with_the_reference(number):
    batch, pairs = Batch(), BatchPairs(number)
    pids = PK.clone()
    pids[3] = -1
    loss = batch.loss(SiameseAttentionLoss(pairs=pairs, **LOOK), pids, CAMIDS)
    expected = reference.in_batch_loss(
        batch.head, batch.classifier, batch.activations, pids.tolist(),
        pairs.draw(pids, CAMIDS).tolist(), attention_weight=0.7, threshold=0.3,
    )  # fmt: skip
    assert expected > 0.1 and loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("number", [8, 40])
@pytest.mark.parametrize("both_orders", [True, False])
def test_gradients_are_those_of_the_same_pairs_in_rows(number, both_orders):
    """Rows hold an image as often as it is compared; in a batch it is there once."""
    batch, pairs = Batch(), BatchPairs(number)
    siamese = SiameseAttentionLoss(pairs=pairs, both_orders=both_orders, **LOOK)
    found = torch.autograd.grad(batch.loss(siamese, PK, CAMIDS), batch.leaves, retain_graph=True)
    rows = pairs.draw(PK, CAMIDS).flatten()
    assert number == 8 or rows.bincount().max() > 2
    maps = batch.activations[rows]
    in_rows = SiameseAttentionLoss(both_orders=both_orders, **LOOK)
    loss = in_rows(batch.classifier, batch.head(maps), PK[rows], maps)
    expected = torch.autograd.grad(loss, batch.leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in found[:3])


def test_rows_named_as_pairs_are_rows_bit_for_bit():
    batch = Batch()
    named = torch.arange(16).view(8, 2)
    maps = siamese_attention(batch.classifier, batch.features, batch.activations)
    again = siamese_attention(batch.classifier, batch.features, batch.activations, named)
    assert torch.equal(maps, again) and maps.max() > 0
    mixed = siamese_attention(batch.classifier, batch.features, batch.activations, named.flip(0))
    assert torch.equal(mixed, maps.view(8, 2, 6, 3).flip(0).flatten(0, 1))


def test_maps_are_differentiated_as_often_as_the_most_frequent_image_occurs(monkeypatch):
    batch, passes, grad = Batch(4), [], torch.autograd.grad
    counted = lambda *args, **kw: passes.append(args) or grad(*args, **kw)  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", counted)
    for pairs, times in (([[0, 1], [0, 2], [3, 0]], 3), ([[2, 1], [0, 3]], 1), ([], 1)):
        named = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        maps = siamese_attention(batch.classifier, batch.features, batch.activations, named)
        assert len(maps) == 2 * len(pairs) and len(passes) == 1 + times  # one for Eq. 4
        passes.clear()
    named = torch.zeros(0, 2, dtype=torch.int64)
    batch = Batch(0)
    maps = siamese_attention(batch.classifier, batch.features, batch.activations, named)
    assert maps.shape == (0, 6, 3)


@pytest.mark.parametrize("pids", [[-1] * 4, [-1, -1, -1, 5]])
def test_a_batch_without_a_pair_gives_a_zero_attached_to_the_graph(pids):
    batch = Batch(4)
    loss = batch.loss(SiameseAttentionLoss(pairs=BatchPairs()), torch.tensor(pids))
    gradients = torch.autograd.grad(loss, batch.leaves)
    assert loss.item() == 0 and all(not gradient.any() for gradient in gradients)


def model_of_a_batch() -> tuple[CASN, torch.Tensor]:
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=16)
    return model, torch.rand(16, 3, 48, 24)


def test_each_image_goes_through_the_network_once():
    model, imgs = model_of_a_batch()
    seen = []
    model.backbone.features[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    siamese = SiameseAttentionLoss(pairs=BatchPairs("all"))
    output = model(imgs, PK, None, siamese, CAMIDS)
    assert seen == [16]
    assert output.distances.shape == (120,) and output.pair_scores.shape == (240, 2)
    assert int(output.same.sum()) == 24
    loss, terms = loss_terms(output, PK, torch.zeros(()), siamese=siamese, lambda_sa=1.0)
    features, activations = output.features, output.activations
    expected = siamese(model.pair_classifier, features, PK, activations, CAMIDS)
    torch.testing.assert_close(loss, expected)
    assert terms["loss_sa"] == loss and 0 <= terms["pair_acc"] <= 100


def test_the_model_without_a_pair_has_finite_terms():
    model, imgs = model_of_a_batch()
    siamese = SiameseAttentionLoss(pairs=BatchPairs())
    unknown = torch.full((16,), -1)
    output = model(imgs, unknown, None, siamese)
    loss, terms = loss_terms(output, unknown, torch.zeros(()), siamese=siamese)
    loss.backward()
    assert loss == 0 and [terms[name] for name in ("loss_bce", "pair_acc")] == [0, 0]


def test_an_identity_balanced_batch_is_refused_where_rows_are_pairs():
    model, imgs = model_of_a_batch()
    siamese = SiameseAttentionLoss()
    for _ in range(2):  # and again, as long as nothing is mended
        with pytest.raises(ValueError, match=r"\(PK\) batch, 4 images of each in a row: choose"):
            model(imgs, PK, None, siamese)
        with pytest.raises(ValueError, match="draw rows of pairs with PairSampler"):
            Batch().loss(siamese, PK)


def test_bad_input_says_what_was_expected(unchecked):
    batch = Batch()
    model, imgs = model_of_a_batch()
    with pytest.raises(TypeError, match="pairs must be 'rows' or a BatchPairs, got 'batch'"):
        SiameseAttentionLoss(pairs="batch")
    with pytest.raises(ValueError, match="chosen inside of a batch need pids"):
        model(imgs, siamese=SiameseAttentionLoss(pairs=BatchPairs()))
    with pytest.raises(ValueError, match="imgs and pids and camids must be of one length"):
        model(imgs, PK, None, SiameseAttentionLoss(pairs=BatchPairs()), CAMIDS[:3])
    for wrong, error in ((torch.tensor([[0, 16]]), ValueError), (torch.rand(2, 2), TypeError),
                         (torch.tensor([0, 1]), ValueError)):  # fmt: skip
        with pytest.raises(error, match="pairs must"):
            siamese_attention(batch.classifier, batch.features, batch.activations, wrong)
        with pytest.raises(error, match="pairs must"):
            split_pairs(PK, wrong)
