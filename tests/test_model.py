"""The wrapper: every backbone of torchreid, plain modules, and what torchreid does with a model."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
import torchreid
from conftest import TinyBackbone, tiny_forward
from torch import nn

from casn_plugin import (
    CASN,
    CASNOutput,
    IdentificationAttentionLoss,
    PairClassifier,
    SiameseAttentionLoss,
    attention_distmat,
)
from casn_plugin.attention import capture
from casn_plugin.losses import casn_loss, identification_loss, siamese_attention_loss
from casn_plugin.model import encode_batches

FACTORY = list(getattr(torchreid.models, "__model_factory"))
SIZES = {"hacnn": (160, 64), "mudeep": (256, 128), "inceptionresnetv2": (160, 128),
         "inceptionv4": (160, 128)}  # fmt: skip
PIDS = torch.tensor([0, 0, 3, 4])
LOSSES = {"identification": IdentificationAttentionLoss(), "siamese": SiameseAttentionLoss()}


def build(name: str, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchreid.models.build_model(name, 5, pretrained=False, use_gpu=False, **kwargs)


def tiny(**kwargs) -> CASN:
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=16, **kwargs)


def state_of(module: nn.Module):
    modes = {name: layer.training for name, layer in module.named_modules()}
    hooks = {
        name: (len(layer._forward_hooks), len(layer._forward_pre_hooks), len(layer._backward_hooks))
        for name, layer in module.named_modules()
    }
    return modes, hooks, copy.deepcopy(module.__dict__.get("loss"))


def test_the_factory_is_whole():
    assert len(FACTORY) == 49


@pytest.mark.parametrize("name", FACTORY)
def test_every_backbone_trains_evaluates_and_ranks(name):
    size = SIZES.get(name, (64, 64))
    backbone = build(name)
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
        backbone = build(name).double().eval()
        for layer in backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):  # untrained statistics leave maps too alike
                layer.running_mean.normal_(0, 0.1)
        model = CASN(backbone, input_size=size, hidden_dim=16)
        imgs = torch.rand(3, 3, *size)
        encoding = model.encode(imgs)
        distmat = attention_distmat(model, encoding[:1], encoding)
        with capture(model._target_module(), at=model._at) as captured:
            features = backbone(imgs)
        for j in (1, 2):
            alpha = reference.indicator(
                model.pair_classifier, features[0].detach(), features[j].detach()
            )
            maps = [
                reference.grad_cam((alpha * features[i]).sum(), captured.require(), i).numpy()
                for i in (0, j)
            ]
            expected = reference.attention_distance(*maps, threshold=0.2)
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


def test_eval_output_is_exactly_the_backbones():
    model = tiny().eval()
    imgs = torch.rand(3, 3, 48, 24)
    torch.testing.assert_close(model(imgs), tiny_forward(model.backbone, imgs)[1], rtol=0, atol=0)


def test_wrapping_leaves_modes_random_state_and_statistics_as_found():
    backbone = TinyBackbone()
    backbone.features[1].eval()
    mean = backbone.features[1].running_mean.clone()
    before, state = state_of(backbone), torch.get_rng_state()
    model = CASN(backbone, forward=tiny_forward, input_size=(48, 24))
    assert torch.equal(torch.get_rng_state(), state)
    assert state_of(backbone) == before
    torch.testing.assert_close(backbone.features[1].running_mean, mean, rtol=0, atol=0)
    model.encode(torch.rand(2, 3, 48, 24))
    assert state_of(backbone) == before


def test_hooks_and_modes_are_left_as_found_after_an_exception():
    model = tiny()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 3, 1, 1).double())
    with pytest.raises(RuntimeError):
        model.encode(torch.rand(2, 3, 48, 24).double())
    assert state_of(model) == before
    backbone = build("resnet18")
    model = CASN(backbone, input_size=(64, 32), hidden_dim=16)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 3, 64, 32).double())
    assert backbone.loss == "softmax"


def test_the_masked_pass_moves_no_statistics():
    with_pass, without = tiny(), tiny()
    without.load_state_dict(with_pass.state_dict())
    imgs = torch.rand(4, 3, 48, 24)
    with_pass(imgs, PIDS, **LOSSES)
    without(imgs)
    for one, other in zip(with_pass.buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_forward_reproduces_the_loss_modules():
    """What the engine reduces is what the drop-in modules compute."""
    model = tiny()
    imgs = torch.rand(4, 3, 48, 24)
    output = model(imgs, PIDS, **LOSSES)
    with capture(model.backbone.features) as captured:
        logits, features = tiny_forward(model.backbone, imgs)
    loss_sa = LOSSES["siamese"](model.pair_classifier, features, PIDS, captured.require())
    same = PIDS[0::2] == PIDS[1::2]
    reduced = siamese_attention_loss(output.pair_scores, output.distances, same)
    torch.testing.assert_close(reduced, loss_sa)
    loss_ia = LOSSES["identification"](
        lambda masked: tiny_forward(model.backbone, masked)[0],
        imgs, PIDS, logits, captured.require(), model.backbone,
    )  # fmt: skip
    torch.testing.assert_close(output.masked_scores.mean(), loss_ia)


def test_forward_trains_what_the_loss_module_trains():
    model, imgs = tiny(), torch.rand(4, 3, 48, 24)

    def classify(masked):
        return tiny_forward(model.backbone, masked)[0]

    weights = list(model.backbone.parameters())
    gradients = {}
    for trains in ("network", "attention"):
        loss = IdentificationAttentionLoss(trains=trains)
        with capture(model.backbone.features) as captured:
            logits, _ = tiny_forward(model.backbone, imgs)
        expected = loss(classify, imgs, PIDS, logits, captured.require(), model.backbone)
        expected = torch.autograd.grad(expected, weights, materialize_grads=True)
        found = model(imgs, PIDS, loss).masked_scores.mean()
        gradients[trains] = torch.autograd.grad(found, weights, materialize_grads=True)
        torch.testing.assert_close(gradients[trains], expected)
    assert all(
        not torch.equal(one, other)
        for one, other in zip(gradients["network"], gradients["attention"], strict=True)
    )


def test_features_of_pcb_in_training_are_its_eval_embedding():
    model = CASN(build("pcb_p4"), input_size=(64, 32), hidden_dim=16)
    output = model(torch.rand(2, 3, 64, 32))
    expected = reference.pcb_embedding(output.activations.detach(), 4)
    torch.testing.assert_close(output.features.detach(), expected)
    assert len(output.logits) == 4


def test_checkpoints_of_backbone_and_wrapped_model_fit_both_ways(tmp_path):
    backbone = build("resnet18")
    path = tmp_path / "backbone.pth"
    torch.save(backbone.state_dict(), path)
    model = CASN(build("resnet18"), input_size=(64, 32), hidden_dim=16)
    torchreid.utils.load_pretrained_weights(model, str(path))
    assert torch.equal(model.backbone.conv1.weight, backbone.conv1.weight)
    assert set(model.state_dict()) - set(backbone.state_dict()) == {
        f"pair_classifier.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    buffer = io.BytesIO()
    torch.save(nn.DataParallel(model).state_dict(), buffer)  # named module.*
    buffer.seek(0)
    again = CASN(build("resnet18"), input_size=(64, 32), hidden_dim=16, seed=7)
    nn.DataParallel(again).load_state_dict(torch.load(buffer, weights_only=True))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    plain = build("resnet18")
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain.classifier.weight, model.backbone.classifier.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if "conv1" not in k})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "stranger": torch.zeros(1)})


class Wrapped(nn.Module):
    """A backbone with a child of its own named backbone, a common layout."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = nn.Conv2d(3, 8, 3, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.ones(8))


def wrapped_forward(net, imgs):
    features = net.backbone(imgs).mean((2, 3)) * net.weight
    return net.fc(features), features


def test_a_backbone_with_a_child_named_backbone():
    net = Wrapped()
    model = CASN(net, forward=wrapped_forward, input_size=(48, 24))
    assert set(model.state_dict()) >= set(net.state_dict())
    other = CASN(Wrapped(), forward=wrapped_forward, input_size=(48, 24), seed=3)
    other.load_state_dict(model.state_dict())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    loaded = other.load_state_dict(Wrapped().state_dict(), strict=False)
    assert all(name.startswith("pair_classifier.") for name in loaded.missing_keys)
    assert not loaded.unexpected_keys


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


def test_conversion_to_sync_batchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny())
    assert isinstance(model.backbone.features[1], nn.SyncBatchNorm)
    assert len(list(model.children())) == 2


def test_models_in_half_precision_train_and_are_told_how_to_rank():
    model = tiny().bfloat16()
    imgs = torch.rand(4, 3, 48, 24).bfloat16()
    output = model(imgs, PIDS, **LOSSES)
    assert output.distances.isfinite().all() and output.masked_scores.isfinite().all()
    with pytest.raises(TypeError, match=r"float32 or wider.*model\.float\(\)"):
        model.encode(imgs)


def test_torchreid_finds_the_layers_of_the_backbone():
    model = CASN(build("resnet18"), input_size=(64, 32), hidden_dim=16)
    torchreid.utils.open_specified_layers(model, ["classifier", "pair_classifier"])
    opened = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in opened} == {"classifier", "0", "2"}
    assert not model.backbone.layer1.training and model.backbone.classifier.training
    output = model(torch.rand(4, 3, 64, 32), PIDS, **LOSSES)  # the last map needs no gradient
    (output.masked_scores.sum() + output.distances.sum() + output.pair_scores.sum()).backward()
    assert model.backbone.classifier.weight.grad.abs().max() > 0
    torchreid.utils.open_all_layers(model)
    assert all(p.requires_grad for p in model.parameters()) and model.backbone.layer1.training
    optimizer = torchreid.optim.build_optimizer(
        model, optim="sgd", lr=1.0, staged_lr=True, new_layers=["classifier", "pair_classifier"],
        base_lr_mult=0.1,
    )  # fmt: skip
    base, new = optimizer.param_groups
    assert base["lr"] == pytest.approx(0.1) and len(new["params"]) == 6
    assert len(base["params"]) + 6 == len(list(model.parameters()))


def test_copies_and_pickles_work():
    model = tiny().eval()
    imgs = torch.rand(2, 3, 48, 24)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(imgs), model(imgs), rtol=0, atol=0)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert other.classifier is other.backbone.classifier
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_the_target_layer_can_be_named_or_given():
    backbone = build("resnet18")
    for target in ("layer3", backbone.layer3):
        model = CASN(backbone, target_layer=target, input_size=(64, 32), hidden_dim=16)
        assert model(torch.rand(2, 3, 64, 32)).activations.shape == (2, 256, 4, 2)


@pytest.mark.parametrize(
    "target", ["layer9", "", nn.Conv2d(3, 3, 1), "classifier", "global_avgpool.x"]
)
def test_a_wrong_target_layer_lists_the_candidates(target):
    with pytest.raises(ValueError, match=r"candidates.*layer3, .*layer4"):
        CASN(build("resnet18"), target_layer=target, input_size=(64, 32))


def test_a_layer_that_is_never_called_is_an_error():
    with pytest.raises(ValueError, match=r"not called.*'layer4'.*candidates"):
        CASN(build("resnet50mid"), target_layer="layer4", input_size=(64, 32))


def test_bad_input_says_what_was_expected(unchecked):
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        CASN("resnet50")
    with pytest.raises(TypeError, match="TinyBackbone is no model of torchreid's factory"):
        CASN(TinyBackbone())
    with pytest.raises(ValueError, match=r"HACNN does not take an image of 64x32.*input_size"):
        CASN(build("hacnn"), input_size=(64, 32))
    with pytest.raises(ValueError, match="no convolution found in Linear"):
        CASN(nn.Linear(3, 3), forward=tiny_forward)
    with pytest.raises(ValueError, match=r"\(B, D\) features in eval mode, got \(1, 8, 6, 3\)"):
        CASN(TinyBackbone(), forward=lambda net, x: (x, net.features(x)), input_size=(48, 24))
    with pytest.raises(ValueError, match="has a layer named pair_classifier already"):
        CASN(tiny(), forward=lambda net, x: net(x))
    with pytest.raises(ValueError, match="needs pids"):
        tiny()(torch.rand(2, 3, 48, 24), identification=IdentificationAttentionLoss())
    with pytest.raises(ValueError, match="even.*has 3"):
        tiny()(torch.rand(3, 3, 48, 24), siamese=SiameseAttentionLoss())
    with pytest.raises(ValueError, match="got 0 and 512"):
        PairClassifier(0)


def test_encode_in_inference_mode_and_half_precision():
    model = tiny()
    with torch.inference_mode():
        encoding = model.encode(torch.rand(2, 3, 48, 24))
    assert encoding.basis.shape == (2, 6, 6, 3) and not encoding.features.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode(torch.rand(2, 3, 48, 24))
    assert half.features.dtype == half.maps.dtype == torch.float32
    assert not torch.equal(half.maps, half.maps.bfloat16().float())  # not rounded on the way


def test_the_pair_classifier_can_be_ones_own():
    own = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    model = tiny(pair_classifier=own)
    assert model.pair_classifier is own
    assert model(torch.rand(2, 3, 48, 24), siamese=SiameseAttentionLoss()).pair_scores.shape == (
        2,
        2,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_on_cuda_as_on_the_cpu(dtype):
    model = CASN(build("osnet_x0_25"), input_size=(64, 32), hidden_dim=16)
    imgs = torch.rand(8, 3, 64, 32)
    pids = torch.tensor([0, 0, 1, 2, 3, 3, 4, 1])
    reference_output = copy.deepcopy(model)(imgs, pids, **LOSSES)
    model.cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        output = model(imgs.cuda(), pids.cuda(), **LOSSES)
    tolerance = 1e-3 if dtype is None else 0.2
    torch.testing.assert_close(
        output.masked_scores.float().cpu(), reference_output.masked_scores, rtol=0, atol=tolerance
    )
    output.distances.sum().backward()
    model.eval()
    encoding = model.encode(imgs.cuda())
    assert attention_distmat(model, encoding, encoding.to("cpu")).device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_parallel_on_cuda():
    model = CASN(build("osnet_x0_25"), input_size=(64, 32), hidden_dim=16).cuda()
    imgs = torch.rand(8, 3, 64, 32).cuda()
    pids = torch.tensor([0, 0, 1, 2, 3, 3, 4, 1]).cuda()
    output = nn.DataParallel(model)(imgs, pids, **LOSSES)
    assert len(output.masked_scores) == len(output.features) == 8 and len(output.distances) == 4


def replicate(network: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them: its own modules, the hooks and tensors shared."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replica, name, tensor)
    return copies[network]


def test_replicas_in_threads_give_what_the_model_gives():
    model = tiny()
    model.backbone.features[1].eval()  # batch statistics would tell the halves from the whole
    pids = torch.tensor([0, 0, 1, 2, 3, 3, 4, 1])
    imgs = torch.rand(8, 3, 48, 24)
    whole = model(imgs, pids, **LOSSES)
    rows = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            replicas = [replicate(model) for _ in rows]
            jobs = [
                pool.submit(replica, imgs[part], pids[part], **LOSSES)
                for replica, part in zip(replicas, rows, strict=True)
            ]
            outputs = [job.result() for job in jobs]
            for field in CASNOutput._fields:
                joined = torch.cat([getattr(output, field) for output in outputs])
                expected = getattr(whole, field)
                torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-5)
    assert not model.backbone.features._forward_hooks


def test_batches_are_encoded_one_after_the_other():
    model = tiny()
    imgs = torch.rand(5, 3, 64, 32)
    batches = [(imgs[:3], torch.tensor([1, 2, 3]), [0, 1, 0]), (imgs[3:], [7, 8], np.array([2, 2]))]
    encoding, pids, camids = encode_batches(model, batches)
    assert pids.tolist() == [1, 2, 3, 7, 8] and camids.tolist() == [0, 1, 0, 2, 2]
    whole = model.encode(imgs)
    torch.testing.assert_close(encoding.features, whole.features)
    torch.testing.assert_close(encoding.maps, whole.maps)
    with pytest.raises(ValueError, match="at least one encoding"):
        encode_batches(model, [])


def test_the_size_that_was_tried_out_is_kept():
    backbone = build("osnet_x0_25")
    assert CASN(backbone).input_size == (256, 128)
    assert CASN(backbone, input_size=(96, 48)).input_size == (96, 48)
