"""The wrapper, and what torchreid and PyTorch do with a model."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchreid
from conftest import PIDS, TinyBackbone, build_backbone, state_of, tiny_forward
from torch import nn

from casn_plugin import (
    CASN,
    CASNOutput,
    IdentificationAttentionLoss,
    PairClassifier,
    SiameseAttentionLoss,
    attention_distmat,
)
from casn_plugin.hooks import capture
from casn_plugin.losses import siamese_attention_loss

LOSSES = {"identification": IdentificationAttentionLoss(), "siamese": SiameseAttentionLoss()}


def tiny(**kwargs) -> CASN:
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=16, **kwargs)


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
    backbone = build_backbone("resnet18")
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


def test_checkpoints_of_backbone_and_wrapped_model_fit_both_ways(tmp_path):
    backbone = build_backbone("resnet18")
    path = tmp_path / "backbone.pth"
    torch.save(backbone.state_dict(), path)
    model = CASN(build_backbone("resnet18"), input_size=(64, 32), hidden_dim=16)
    torchreid.utils.load_pretrained_weights(model, str(path))
    assert torch.equal(model.backbone.conv1.weight, backbone.conv1.weight)
    assert set(model.state_dict()) - set(backbone.state_dict()) == {
        f"pair_classifier.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    buffer = io.BytesIO()
    torch.save(nn.DataParallel(model).state_dict(), buffer)  # named module.*
    buffer.seek(0)
    again = CASN(build_backbone("resnet18"), input_size=(64, 32), hidden_dim=16, seed=7)
    nn.DataParallel(again).load_state_dict(torch.load(buffer, weights_only=True))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    plain = build_backbone("resnet18")
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
    model = CASN(build_backbone("resnet18"), input_size=(64, 32), hidden_dim=16)
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


def test_bad_input_says_what_was_expected(unchecked):
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        CASN("resnet50")
    with pytest.raises(TypeError, match="TinyBackbone is no model of torchreid's factory"):
        CASN(TinyBackbone())
    with pytest.raises(ValueError, match=r"HACNN does not take an image of 64x32.*input_size"):
        CASN(build_backbone("hacnn"), input_size=(64, 32))
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
    model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32), hidden_dim=16)
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
    model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32), hidden_dim=16).cuda()
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
