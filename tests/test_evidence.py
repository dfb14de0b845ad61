"""What attention is evidence of: a pair classifier, trained or not, or the similarity."""

import copy
import io
import json
import re

import pytest
import torch
from conftest import PIDS, TinyBackbone, build_backbone, tiny_forward
from torch import nn

from casn_plugin import (
    CASN,
    Encoding,
    Evidence,
    IdentificationAttentionLoss,
    PairClassifier,
    SiameseAttentionLoss,
    Similarity,
    attention_distmat,
    explain_pair,
    rank_gallery,
)
from casn_plugin.attention import similarity_attention
from casn_plugin.checkpoint import (
    TrainingState,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from casn_plugin.checks import check_optimizer
from casn_plugin.evidence import evidence_of, probabilities
from casn_plugin.pretrained import from_pretrained, save_pretrained
from casn_plugin.ranking import pair_attention, same_identity_logits

SIZE = (64, 32)


def similar(net=None, forward=tiny_forward, **options):
    net = net or TinyBackbone()
    return CASN(net, forward=forward, input_size=SIZE, pair_classifier=Similarity(), **options)


WRONG = {
    "three scores": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "came (2, 3)"),
    "one score": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), "came (2, 1)"),
    "wide": (PairClassifier(7), "takes differences of dimension 7, got features of 6"),
    "narrow inside": (nn.Sequential(nn.Linear(6, 8), nn.Linear(9, 2)), "does not take differences"),
    "nothing": (nn.Identity(), "came (2, 6)"),
    "no tensor": (nn.LSTM(6, 2), "came tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pair_classifier_that_gives_no_two_scores_is_refused_before_it_is_used(name):
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        CASN(TinyBackbone(), forward=tiny_forward, input_size=SIZE, pair_classifier=wrong)
    model = nn.Module()
    model.pair_classifier = wrong
    images = Encoding(torch.rand(3, 6), basis=torch.rand(3, 6, 4, 2))
    for function in (attention_distmat, pair_attention, same_identity_logits, rank_gallery):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(model, images, images)


def test_a_pair_classifier_is_a_module_in_the_place_and_numbers_of_the_backbone(unchecked):
    options = {"forward": tiny_forward, "input_size": SIZE}
    for wrong, message in (
        (lambda differences: differences[:, :2], "got <class 'function'>"),
        (5, "got <class 'int'>"),
        (PairClassifier, "got the class PairClassifier"),
    ):
        with pytest.raises(TypeError, match=message):
            CASN(TinyBackbone(), pair_classifier=wrong, **options)
    with pytest.raises(ValueError, match="one dtype, got cpu, torch.float32 and cpu, torch.float6"):
        CASN(TinyBackbone(), pair_classifier=PairClassifier(6).double(), **options)
    own = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout().eval(), nn.Linear(6, 2))
    CASN(TinyBackbone().train(), pair_classifier=own, **options)
    assert own[0].num_batches_tracked == 0  # tried out, and left as found


def test_a_pair_classifier_knows_whether_it_was_trained():
    classifier = PairClassifier(6, 8, seed=3)
    for untrained in (classifier, copy.deepcopy(classifier), copy.deepcopy(classifier).half()):
        assert evidence_of(untrained) is Evidence.UNTRAINED
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    classifier(torch.rand(4, 6)).square().sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(classifier, file)
    file.seek(0)
    loaded = PairClassifier(6, 8, seed=3)
    loaded.load_state_dict(classifier.state_dict())
    for trained in (classifier, torch.load(file, weights_only=False), loaded):
        assert evidence_of(trained) is Evidence.TRAINED
    assert evidence_of(nn.Linear(6, 2)) is Evidence.OWN  # nobody but the caller knows
    assert evidence_of(CASN(TinyBackbone(), forward=tiny_forward).pair_classifier).value == (
        "pair classifier with its initial weights (never trained)"
    )


def loaded(state, model):
    model.load_state_dict(state)
    return model


def resumed(model, folder, other):
    training = [TrainingState(each, torch.optim.SGD(each.parameters(), 0.1))
                for each in (model, other)]  # fmt: skip
    training[1].restore(load_checkpoint(save_checkpoint(training[0].state(1), folder / "model")))
    return other


WAYS = {
    "pretrained": lambda model, folder, _: from_pretrained(
        save_pretrained(model, folder, None), backbone=TinyBackbone(), forward=tiny_forward
    ),
    "resume": resumed,
    "weights": lambda model, folder, other: (
        load_weights(other, save_checkpoint({"state_dict": model.state_dict()}, folder / "model"))
        and other
    ),
    "state": lambda model, _, other: loaded(model.state_dict(), other),
    "assigned": lambda model, _, other: (
        other.load_state_dict(model.state_dict(), assign=True) and other
    ),
    "rounded": lambda model, *_: model.half().bfloat16().double().float(),
    "rounded before": lambda model, _, other: loaded(model.bfloat16().state_dict(), other),
    "parameters rounded": lambda model, *_: (
        [setattr(each, "data", each.bfloat16().float()) for each in model.parameters()] and model
    ),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_known_wherever_weights_go(tmp_path, way, trained):
    model, other = (CASN(TinyBackbone(), forward=tiny_forward, seed=seed) for seed in (5, 6))
    if trained:
        model.pair_classifier(torch.rand(4, 6)).square().sum().backward()
        torch.optim.Adam(model.parameters(), 1e-5).step()
    again = WAYS[way](model, tmp_path, other)
    expected = Evidence.TRAINED if trained else Evidence.UNTRAINED
    assert evidence_of(again.pair_classifier) is expected


def test_states_of_before_are_compared_with_the_initial_weights_of_ones_own_seed():
    first, second = PairClassifier(6, 8, seed=3), PairClassifier(6, 8, seed=3)
    state = dict(first.state_dict())
    del state["initial"]
    assert str(second.load_state_dict(state)) == "<All keys matched successfully>"
    assert evidence_of(second) is Evidence.UNTRAINED
    second.load_state_dict({**state, "2.weight": state["2.weight"] + 0.1})
    assert evidence_of(second) is Evidence.TRAINED


def test_the_words_are_the_same_in_text_and_in_json():
    for evidence in Evidence:
        assert f"{evidence}" == str(evidence) == json.loads(json.dumps(evidence)) == evidence.value
    assert Evidence("trained pair classifier") is Evidence.TRAINED


def test_a_similarity_has_no_weights_and_no_probability():
    model = similar()
    assert model.state_dict().keys() == model.backbone.state_dict().keys()
    assert not list(model.pair_classifier.parameters())
    scores = torch.tensor([0.0, 2.0])
    assert probabilities(model.pair_classifier, scores) == [None, None]
    assert probabilities(PairClassifier(6), scores) == pytest.approx([0.5, 0.8808], abs=1e-4)


def test_features_of_unlike_numbers_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"one size, got \(2, 4\) and \(3, 4\)"):
        Similarity()(torch.rand(2, 4), torch.rand(3, 4))


def test_the_siamese_loss_needs_a_pair_classifier_and_the_other_does_not():
    model, imgs = similar().train(), torch.rand(4, 3, *SIZE)
    with pytest.raises(TypeError, match="has no weights: the Siamese loss needs a PairClassifier"):
        model(imgs, PIDS, siamese=SiameseAttentionLoss())
    output = model(imgs, PIDS, IdentificationAttentionLoss())
    assert output.masked_scores.shape == (4,)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    check_optimizer(model, optimizer, pairs=False)
    with pytest.raises(ValueError, match="no weights to train: lambda_sa must be 0"):
        check_optimizer(model, optimizer, pairs=True)


def masked(net, imgs):
    """Features of four cells of the 8 x 4 map, rows 3 and 4, columns 1 and 2, and nothing else."""
    mask = torch.zeros_like(imgs)
    mask[:, :, 24:40, 8:24] = 1
    return None, net(imgs * mask).mean((2, 3))


def test_attention_lies_on_the_patch_that_features_depend_on():
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8, bias=False), nn.ReLU())
    model = similar(net, masked, target_layer="1")
    found = explain_pair(model, *torch.randn(2, 3, *SIZE))
    for side in (found.first, found.second):
        inside = side.attention[3:5, 1:3].sum()
        assert inside > 0
        torch.testing.assert_close(side.attention.relu().sum(), inside)
        assert {*side.span} <= {3, 4}


def test_attention_is_on_what_both_share_and_not_on_what_one_has_alone():
    net = nn.Sequential(nn.Conv2d(3, 3, 8, 8, bias=False))
    net[0].weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) / 64
    model = similar(net, lambda net, imgs: (None, net(imgs).mean((2, 3))))
    first, second = torch.zeros(2, 3, *SIZE)
    first[0, 8:16, 8:16] = second[0, 48:56, 16:24] = 1  # red in both, at unlike places
    first[1, 32:40, 0:8] = 1  # green in the first alone
    second[2, 0:8, 24:32] = 1  # blue in the second alone
    found = explain_pair(model, first, second)
    for side, place in ((found.first, (1, 1)), (found.second, (6, 2))):
        expected = torch.zeros(8, 4)
        expected[place] = 1
        torch.testing.assert_close(side.attention, expected)
    assert found.similarity == pytest.approx(0.5, abs=1e-6) and found.probability is None
    assert found.evidence is Evidence.SIMILARITY


@pytest.mark.parametrize(
    ("name", "size"),
    [("osnet_x0_25", (128, 64)), ("mobilenetv2_x1_0", (128, 64)), ("pcb_p4", (128, 64))],
)
def test_networks_of_torchreid_agree_with_autograd(name, size):
    """From pictures on: the closed form, and the Grad-CAM of the cosine through the network."""
    backbone = build_backbone(name, loss="softmax").double().eval()
    model = CASN(backbone, input_size=size, pair_classifier=Similarity())
    imgs = torch.randn(4, 3, *size, dtype=torch.float64)
    found = torch.stack(pair_attention(model, model.encode(imgs[::2]), model.encode(imgs[1::2])), 1)
    with model.reader.capture(backbone) as captured:
        features = model.reader.features(backbone, imgs)
    expected = similarity_attention(features, captured.require()).unflatten(0, (2, 2))
    assert expected.amax((2, 3)).min() > 0
    errors = (found - expected).abs().amax((2, 3)) / expected.amax((2, 3))
    assert errors.max() < 1e-8
