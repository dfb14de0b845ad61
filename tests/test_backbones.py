"""Every backbone of torchreid, and plain modules: what is tapped, and what is made of it."""

import copy

import pytest
import reference
import torch
import torchreid
from conftest import PIDS, build_backbone, state_of
from torch import nn

from casn_plugin import (
    CASN,
    CASNOutput,
    IdentificationAttentionLoss,
    Preprocessing,
    SiameseAttentionLoss,
    attention_distmat,
)
from casn_plugin.hooks import capture
from casn_plugin.losses import casn_loss, identification_loss, siamese_attention_loss

LOSSES = {"identification": IdentificationAttentionLoss(), "siamese": SiameseAttentionLoss()}


FACTORY = list(getattr(torchreid.models, "__model_factory"))
SIZES = {"hacnn": (160, 64), "mudeep": (256, 128), "inceptionresnetv2": (160, 128),
         "inceptionv4": (160, 128)}  # fmt: skip


def narrow(name: str) -> nn.Module:
    """A backbone of the factory; of two, fewer of those features that are read one by one.

    They stay more than channels, so that the way by channels is tried first, and fails on both.
    """
    if name == "hacnn":
        return torchreid.models.hacnn.HACNN(5, feat_dim=224, use_gpu=False)
    backbone = build_backbone(name)
    if name == "mudeep":
        backbone.fc[0], backbone.fc[1] = nn.Linear(256 * 16 * 8, 320), nn.BatchNorm1d(320)
        backbone.classifier, backbone.feat_dim = nn.Linear(320, 5), 320
    return backbone


def test_the_factory_is_whole():
    assert len(FACTORY) == 49


@pytest.mark.parametrize("name", FACTORY)
def test_every_backbone_trains_evaluates_and_ranks(name):
    size = SIZES.get(name, (64, 64))
    backbone = narrow(name)
    backbone.train()
    before = state_of(backbone)
    model = CASN(backbone, input_size=size, hidden_dim=16)
    imgs = torch.rand(4, 3, *size)
    output = model(imgs, PIDS, **LOSSES)
    assert isinstance(output, CASNOutput)
    loss = casn_loss(
        identification_loss(output.logits, PIDS),
        output.masked_scores.mean(),
        siamese_attention_loss(output.pair_scores, output.distances, PIDS[0::2] == PIDS[1::2]),
    )
    loss.backward()
    assert loss.isfinite()
    first = next(p for p in backbone.parameters() if p.ndim == 4)
    assert first.grad.isfinite().all() and first.grad.abs().max() > 0
    assert output.activations.ndim == 4 and min(output.activations.shape[2:]) > 1
    assert model.reader.classes(backbone) == 5
    assert state_of(backbone) == before

    model.eval()
    with torch.no_grad():
        features = model(imgs)
        torch.testing.assert_close(features, backbone(imgs), rtol=0, atol=0)
        encoding = model.encode(imgs[:3])
    # features of a batch of another size are equal up to rounding
    torch.testing.assert_close(encoding.features, features[:3], rtol=1e-3, atol=1e-5)
    distmat = attention_distmat(model, encoding[:1], encoding)
    assert distmat.shape == (1, 3) and distmat.isfinite().all()
    assert distmat[0, 0] <= 1e-4


@pytest.mark.parametrize(
    "name", ["resnet18", "osnet_x0_25", "pcb_p4", "densenet121_fc512", "mlfn", "resnet50mid",
             "hacnn", "squeezenet1_0"],
)  # fmt: skip
def test_ranking_of_real_backbones_agrees_with_autograd(name):
    """All three kinds of head, in float64, against autograd pair by pair."""
    size = SIZES.get(name, (64, 32))
    torch.set_default_dtype(torch.float64)  # hacnn makes tensors of its own
    try:
        backbone = narrow(name).double().eval()
        for layer in backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):  # untrained statistics leave maps too alike
                layer.running_mean.normal_(0, 0.1)
        model = CASN(backbone, input_size=size, hidden_dim=16)
        imgs = torch.rand(3, 3, *size)
        encoding = model.encode(imgs)
        distmat = attention_distmat(model, encoding[:1], encoding)
        with model.reader.capture(backbone) as captured:
            features = backbone(imgs)
        for j in (1, 2):
            expected = reference.distance_of_rows(
                model.pair_classifier, features, captured.require(), 0, j, threshold=0.2
            )
            assert distmat[0, j].item() == pytest.approx(expected, abs=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


def vgg_forward(vgg, imgs):
    features = vgg.classifier[:-1](vgg.avgpool(vgg.features(imgs)).flatten(1))
    return vgg.classifier[-1](features), features


def test_vgg16_of_torchvision():
    """The paper names VGGNet; its pooled map is not pooled to one value."""
    from torchvision.models import vgg16

    vgg = vgg16(num_classes=5)
    vgg.classifier[0], vgg.classifier[3] = nn.Linear(512 * 49, 64), nn.Linear(64, 64)
    vgg.classifier[6] = nn.Linear(64, 5)
    model = CASN(vgg, forward=vgg_forward, input_size=(96, 64), hidden_dim=16)
    imgs = torch.rand(4, 3, 96, 64)
    output = model(imgs, PIDS, **LOSSES)
    assert output.activations.shape == (4, 512, 3, 2) and output.features.shape == (4, 64)
    encoding = model.encode(imgs)
    assert attention_distmat(model, encoding, encoding).diagonal().max() <= 1e-4


def timm_forward(net, imgs):
    maps = net.forward_features(imgs)
    return net.forward_head(maps), net.forward_head(maps, pre_logits=True)


def test_a_model_of_timm():
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet18", num_classes=5)
    model = CASN(net, forward=timm_forward, input_size=(64, 64), hidden_dim=16)
    imgs = torch.rand(4, 3, 64, 64)
    # the head runs twice; the map is what its last call took
    output = model(imgs, PIDS, siamese=SiameseAttentionLoss())
    assert output.activations.shape == (4, 512, 2, 2)
    torch.testing.assert_close(output.features, output.activations.mean((2, 3)))
    by_name = CASN(net, forward=timm_forward, input_size=(64, 64), target_layer="layer3")
    assert by_name(imgs).activations.shape == (4, 256, 4, 4)


def test_features_of_pcb_in_training_are_its_eval_embedding():
    model = CASN(build_backbone("pcb_p4"), input_size=(64, 32), hidden_dim=16)
    output = model(torch.rand(2, 3, 64, 32))
    expected = reference.pcb_embedding(output.activations.detach(), 4)
    torch.testing.assert_close(output.features.detach(), expected)
    assert len(output.logits) == 4


@pytest.mark.parametrize("target", ["layer3", "layer4", "layer4.0.conv2"])
def test_features_of_pcb_do_not_depend_on_the_tapped_layer(target):
    pcb = torchreid.models.pcb
    net = pcb.PCB(5, "softmax", pcb.BasicBlock, [1, 1, 1, 1], parts=4)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # so that the eval statistics stay
    model = CASN(net, input_size=(64, 32), hidden_dim=16, target_layer=target)
    imgs = torch.rand(4, 3, 64, 32)
    with capture(net.parts_avgpool, at="input") as captured:
        output = model(imgs, PIDS, **LOSSES)
    assert output.distances.isfinite().all()
    with capture(net.parts_avgpool, at="input") as captured:
        output = model(imgs)
    expected = reference.pcb_embedding(captured.require().detach(), 4)
    torch.testing.assert_close(output.features.detach(), expected)


def test_the_target_layer_can_be_named_or_given():
    backbone = build_backbone("resnet18")
    for target in ("layer3", backbone.layer3):
        model = CASN(backbone, target_layer=target, input_size=(64, 32), hidden_dim=16)
        assert model(torch.rand(2, 3, 64, 32)).activations.shape == (2, 256, 4, 2)


@pytest.mark.parametrize(
    "target", ["layer9", "", nn.Conv2d(3, 3, 1), "classifier", "global_avgpool.x"]
)
def test_a_wrong_target_layer_lists_the_candidates(target):
    with pytest.raises(ValueError, match=r"candidates.*layer2 \(128x8x4\), .*layer3 \(256x4x2\)"):
        CASN(build_backbone("resnet18"), target_layer=target, input_size=(64, 32))


def test_a_layer_that_is_never_called_is_an_error():
    with pytest.raises(ValueError, match=r"not called.*'layer4'.*candidates"):
        CASN(build_backbone("resnet50mid"), target_layer="layer4", input_size=(64, 32))


def test_classes_are_those_of_the_classifier_that_is_there_now():
    model = CASN(build_backbone("pcb_p4"), input_size=(64, 32), hidden_dim=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.reader.classes(model.backbone) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.classifier = nn.ModuleList([nn.Linear(256, 7) for _ in range(4)])
    assert model.reader.classes(model.backbone) == 7
    without = CASN(nn.Sequential(nn.Conv2d(3, 4, 3)), forward=features_alone, hidden_dim=16)
    with pytest.raises(ValueError, match="Sequential has no classifier, so it gives no logits"):
        without.reader.classes(without.backbone)


def features_alone(net, imgs):
    return None, net(imgs).mean((2, 3))


def test_the_size_that_was_tried_out_is_kept():
    backbone = build_backbone("osnet_x0_25")
    assert CASN(backbone).preprocessing == Preprocessing((256, 128))
    assert CASN(backbone, input_size=(96, 48)).preprocessing.size == (96, 48)


def test_timms_networks_say_their_colours():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    prepared = CASN(vit, hidden_dim=4).preprocessing
    assert prepared == Preprocessing((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    grey = timm.create_model("resnet10t", num_classes=4)
    grey.pretrained_cfg = {**grey.pretrained_cfg, "mean": (0.5,), "std": (0.5,)}
    assert CASN(grey, hidden_dim=4, input_size=(64, 32)).preprocessing == Preprocessing((64, 32))


class Torchreidlike(nn.Module):
    """A network of one's own that is built as torchreid builds its own; `two` joins two maps.

    It gives logits "in training", beside features, or "alone" there; others also in eval mode:
    "always" alone, or in training beside features, "in both".
    """

    loss = "softmax"

    def __init__(self, two=False, logits="in training"):
        super().__init__()
        self.when, self.calls, self.norm = logits, 0, nn.BatchNorm1d(16 if two else 8)
        self.drop = nn.Dropout()
        self.first, self.second = nn.Conv2d(3, 8, 3, 8), nn.Conv2d(8, 8, 3, 2, 1)
        self.global_avgpool, self.two = nn.AdaptiveAvgPool2d(1), two
        self.classifier = nn.Linear(16 if two else 8, 5)

    def forward(self, imgs):
        first = self.first(imgs).tanh()
        pooled = [self.global_avgpool(first)] if self.two else []
        pooled.append(self.global_avgpool(self.second(first).tanh()))
        features = self.norm(torch.cat(pooled, 1).flatten(1))
        self.calls += self.training
        logits = self.classifier(self.drop(features) if self.training else features)
        if not self.training:
            return features if self.when in ("in training", "alone") else logits
        both = self.loss == "triplet" and self.when in ("in training", "in both")
        return (logits, features) if both else logits


@pytest.mark.parametrize(
    ("two", "tap"), [(False, ("global_avgpool", "input")), (True, ("first", "output"))]
)
def test_the_pooling_of_one_of_two_maps_is_not_taken_for_the_whole(two, tap):
    model = CASN(Torchreidlike(two), input_size=(64, 32)).eval()
    assert (model.reader.target_layer, model.reader.at) == tap
    assert model.encode(torch.rand(2, 3, 64, 32)).basis.abs().amax((0, 2, 3)).all()


def test_what_is_known_not_to_be_whole_is_read_as_known(monkeypatch):
    backbone = build_backbone("resnet50mid")
    assert CASN(backbone, input_size=(64, 64)).reader.target_layer == "global_avgpool"
    monkeypatch.setattr("casn_plugin.backbones._FUSED", ())
    assert CASN(backbone, input_size=(64, 64)).reader.target_layer == "layer4.0"


@pytest.mark.parametrize("when", ["always", "in both"])
def test_a_network_that_gives_logits_in_eval_mode_is_not_asked_as_torchreids(when):
    torch.manual_seed(0)
    backbone, imgs = Torchreidlike(logits=when), torch.rand(4, 3, 64, 32)
    model = CASN(backbone, input_size=(64, 32))
    assert model.reader.feature_dim == 8
    output = model(imgs, PIDS, **LOSSES)
    assert output.logits.shape == (4, 5) and output.features.shape == (4, 8)
    assert model.eval()(imgs).shape == (4, 8)


def test_a_network_that_gives_no_features_in_training_mode_is_refused():
    message = (
        r"Torchreidlike has loss='softmax', as torchreid's .* must give \(logits, .* gave "
        r"a Tensor of \(2, 5\), and it does not end in a classifier.*forward="
    )
    with pytest.raises(TypeError, match=message):
        CASN(Torchreidlike(logits="alone"), input_size=(64, 32))
    model = CASN(Torchreidlike(), input_size=(64, 32))
    model.backbone.when = "alone"  # since
    with pytest.raises(ValueError, match=r"but it gave a Tensor of \(4, 5\)"):
        model(torch.rand(4, 3, 64, 32))


def test_the_training_pass_of_the_try_out_leaves_nothing():
    backbone = Torchreidlike()
    before, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    model = CASN(backbone, input_size=(64, 32), hidden_dim=4)
    assert backbone.calls == 0 and backbone.loss == "softmax" and model.reader.at == "input"
    torch.testing.assert_close(dict(backbone.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
