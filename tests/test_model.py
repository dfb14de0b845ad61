"""The wrapper, and what torchreid and PyTorch do with a model."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torchreid
from conftest import PIDS, TinyBackbone, build_backbone, state_of, tiny_forward
from torch import nn
from torch.utils.checkpoint import checkpoint

from casn_plugin import (
    CASN,
    CASNOutput,
    IdentificationAttentionLoss,
    PairClassifier,
    Preprocessing,
    SiameseAttentionLoss,
    attention_distmat,
)
from casn_plugin.hooks import capture
from casn_plugin.losses import siamese_attention_loss
from casn_plugin.model import as_casn

LOSSES = {"identification": IdentificationAttentionLoss(), "siamese": SiameseAttentionLoss()}


def tiny(**kwargs) -> CASN:
    kwargs.setdefault("target_layer", "features")
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
    model, imgs = tiny(), torch.rand(2, 3, 48, 24)
    for run in (model, model.encode):
        with pytest.raises(TypeError, match="one dtype, got torch.float64 and torch.float32"):
            run(imgs.double())
    model.backbone.embed[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state_of(model)
    for run in (model, model.encode):
        with pytest.raises(ZeroDivisionError):
            run(imgs)
    assert state_of(model) == before
    backbone = build_backbone("resnet18")
    model = CASN(backbone, input_size=(64, 32), hidden_dim=16)
    handle = backbone.layer4.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.rand(2, 3, 64, 32))
    handle.remove()
    assert backbone.loss == "softmax" and model.training


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
        f"pair_classifier.{name}"
        for name in ("initial", "0.weight", "0.bias", "2.weight", "2.bias")
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


def names_agree(model: CASN) -> bool:
    """Every tool that walks a module finds the same names, and the checkpoint loads back."""
    listed = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    layers = {name for name, _ in model.named_modules()}
    assert {name.rpartition(".")[0] for name in listed} <= layers
    assert {name for name, _ in model.named_children()} <= layers
    state = model.state_dict()
    assert len(state) == len({value.data_ptr() for value in state.values()})
    model.load_state_dict(state)
    return listed == set(state)


def test_names_are_the_same_wherever_they_are_asked_for():
    assert names_agree(tiny()) and names_agree(
        CASN(build_backbone("resnet18"), input_size=(64, 32))
    )
    net = Wrapped()
    model = CASN(net, forward=wrapped_forward, input_size=(48, 24))
    assert names_agree(model) and len(list(model.modules())) == len(list(net.modules())) + 5
    assert set(model.get_parameter("weight").shape) == {8}


@pytest.mark.parametrize("through", ["attribute", "backbone", "add_module", "_modules"])
def test_a_layer_that_is_set_is_trained_saved_and_loaded(through):
    model, new = tiny(), nn.Linear(6, 7)
    if through == "attribute":
        model.classifier = new
    elif through == "backbone":
        model.backbone.classifier = new
    elif through == "add_module":
        model.add_module("classifier", new)
    else:  # as torch's own quantization sets layers
        model._modules["classifier"] = new
    before = new.weight.detach().clone()
    assert model.classifier is model.backbone.classifier is new
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(torch.rand(4, 3, 48, 24)).logits, PIDS).backward()
    optimizer.step()
    assert not torch.equal(new.weight, before)
    assert torch.equal(model.state_dict()["classifier.weight"], new.weight)
    assert names_agree(model)


def test_parameters_buffers_and_settings_are_set_where_they_were():
    model = CASN(Wrapped(), forward=wrapped_forward, input_size=(48, 24))
    model.weight = nn.Parameter(torch.zeros(8))
    assert model.backbone.weight is model.weight and names_agree(model)
    backbone = build_backbone("resnet18")
    model = CASN(backbone, input_size=(64, 32), hidden_dim=16)
    model.loss, model.bn1.running_mean = "triplet", torch.ones(64)
    assert backbone.loss == "triplet" and backbone.bn1.running_mean.sum() == 64
    model.fc = nn.Linear(2, 2)  # torchreid's ResNet has one, None
    assert backbone.fc is model.fc and "fc" not in model._modules
    del model.fc
    assert not hasattr(backbone, "fc") and names_agree(model)
    backbone.fc = None
    model.note = "mine"  # what the backbone does not have is the wrapper's
    assert not hasattr(backbone, "note")
    backbone.preprocessing = "its own"
    model.preprocessing = Preprocessing((96, 48))
    assert model.preprocessing.size == (96, 48) and backbone.preprocessing == "its own"
    model.pair_classifier = PairClassifier(512, 4)
    assert model(torch.rand(2, 3, 64, 32), siamese=LOSSES["siamese"]).pair_scores.shape == (2, 2)


def test_dynamic_quantization_reaches_the_backbone():
    model = tiny().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for layer in (small.backbone.classifier, small.pair_classifier[0]):
        assert type(layer) is torch.ao.nn.quantized.dynamic.Linear
    assert set(small._modules) == {"backbone", "pair_classifier"}
    imgs = torch.rand(3, 3, 48, 24)
    torch.testing.assert_close(small(imgs), model(imgs), rtol=0.1, atol=0.05)


class Checkpointed(TinyBackbone):
    """Computes its convolutions again in the backward pass."""

    on, reentrant = True, False

    def __init__(self):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, imgs):
        run = partial(checkpoint, self.features, use_reentrant=self.reentrant)
        maps = run(imgs) if self.on and self.training else self.features(imgs)
        features = self.embed(self.global_avgpool(self.relu(maps)).flatten(1))
        return self.classifier(features), features


@pytest.mark.parametrize("trains", ["attention", "network"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(trains, reentrant):
    imgs = torch.rand(4, 3, 48, 24)
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        net = Checkpointed()
        net.on, net.reentrant = on, reentrant
        model = CASN(net, forward=Checkpointed.forward, input_size=(48, 24))
        norm = net.features[1]
        before = norm.num_batches_tracked.item()
        output = model(
            imgs.clone().requires_grad_(), PIDS, IdentificationAttentionLoss(trains=trains)
        )
        loss = output.logits.logsumexp(1).mean() + 9 * output.masked_scores.mean()
        loss.backward()
        found.append([p.grad for p in net.parameters()])
        # torch's checkpointing shows a BatchNorm its batch twice; never the masked one
        assert norm.num_batches_tracked.item() - before == (2 if on else 1)
    torch.testing.assert_close(found[1], found[0])
    assert found[0][0].abs().max() > 0


def test_a_map_inside_of_reentrant_checkpointing_is_refused():
    net = Checkpointed()
    options = {"forward": Checkpointed.forward, "input_size": (48, 24), "target_layer": "features"}
    model = CASN(net, **options)
    imgs = torch.rand(4, 3, 48, 24).requires_grad_()
    assert model(imgs, PIDS, **LOSSES).masked_scores.isfinite().all()
    net.reentrant = True
    with pytest.raises(ValueError, match=r"'features' ran without gradients.*use_reentrant=False"):
        model(imgs, PIDS, **LOSSES)
    with torch.no_grad():
        assert model(imgs).activations.shape == (4, 8, 6, 3)


def test_threads_encode_with_one_model_in_any_mode():
    model = tiny()
    model.backbone.features[1].momentum = None
    imgs = torch.rand(16, 2, 3, 48, 24)
    expected = [copy.deepcopy(model).eval().encode(each).features for each in imgs]
    before, statistics = state_of(model), copy.deepcopy(dict(model.named_buffers()))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = list(pool.map(model.encode, imgs))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.features, other, rtol=1e-4, atol=1e-5)
    assert state_of(model) == before
    torch.testing.assert_close(dict(model.named_buffers()), statistics, rtol=0, atol=0)


def test_the_model_traces_and_exports_as_the_backbone_does(tmp_path):
    model = CASN(build_backbone("osnet_x0_25"), input_size=(64, 32), hidden_dim=16).eval()
    imgs, others = torch.rand(2, 3, 64, 32), torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        expected = model(others)
    traced = torch.jit.trace(model, imgs)
    torch.testing.assert_close(traced(others), expected)
    traced.save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(others), expected)
    exported = torch.export.export(model, (imgs,))
    torch.testing.assert_close(exported.module()(others), expected)
    assert set(exported.state_dict) <= set(model.state_dict())
    assert [name for name, _ in model.named_children()][-1] == "pair_classifier"


def test_wrappers_of_pytorch_are_seen_through():
    model = tiny()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert as_casn(nn.DataParallel(model)) is model
    assert as_casn(torch.compile(model, backend="eager")) is model
    assert isinstance(as_casn(nn.DataParallel(averaged)), CASN)
    averaged.update_parameters(model)
    torch.testing.assert_close(
        dict(as_casn(averaged).named_parameters()), dict(model.named_parameters())
    )
    with pytest.raises(TypeError, match="must be a CASN.*got TinyBackbone"):
        as_casn(nn.DataParallel(TinyBackbone()))
    for wrap in (nn.DataParallel, torch.compile):
        with pytest.raises(TypeError, match=r"got it inside of \w+: wrap CASN\(network\)"):
            CASN(wrap(build_backbone("resnet18")))


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
    with pytest.raises(ValueError, match="Linear does not take an image of 256x128"):
        CASN(nn.Linear(3, 3), forward=tiny_forward)
    with pytest.raises(ValueError, match=r"\(B, D\) features in eval mode, got \(2, 8, 6, 3\)"):
        CASN(TinyBackbone(), forward=lambda net, x: (x, net.features(x)), input_size=(48, 24))
    with pytest.raises(ValueError, match="has a layer named pair_classifier already"):
        CASN(tiny(), forward=lambda net, x: net(x))
    with pytest.raises(ValueError, match="needs pids"):
        tiny()(torch.rand(2, 3, 48, 24), identification=IdentificationAttentionLoss())
    with pytest.raises(ValueError, match="even.*has 3"):
        tiny()(torch.rand(3, 3, 48, 24), siamese=SiameseAttentionLoss())
    with pytest.raises(ValueError, match="feature_dim must be at least 1, got 0"):
        PairClassifier(0)


@pytest.mark.parametrize("name", ["tiny", "pcb_p6"])
def test_flip_averages_every_image_with_its_mirror_image(name):
    model = tiny() if name == "tiny" else CASN(build_backbone(name), hidden_dim=16)
    imgs = torch.rand(2, 3, *model.preprocessing.size)
    plain, mirrored = model.encode(imgs), model.encode(imgs.flip(3))
    assert model.flip is False
    model.flip = True
    found, again = model.encode(imgs), model.encode(imgs.flip(3))
    assert torch.equal(found.maps, ((plain.maps + mirrored.maps.flip(3)) / 2))
    if name == "tiny":
        torch.testing.assert_close(found.features, (plain.features + mirrored.features) / 2)
    else:  # parts stay of unit length
        assert found.parts == 6
        torch.testing.assert_close(
            found.features.norm(dim=1), torch.full((2,), 6**0.5), rtol=0, atol=1e-5
        )
    # whichever way round a picture is, it is encoded the same, and looked at where it is
    torch.testing.assert_close(found.features, again.features, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.maps, again.maps.flip(3), rtol=0, atol=1e-6)
    assert not torch.allclose(plain.maps, mirrored.maps.flip(3), atol=1e-4)
    assert copy.deepcopy(model).flip and "flip" not in model.state_dict()


def test_flip_is_true_or_false(unchecked):
    model = tiny()
    model.flip = np.True_
    for wrong in (1, "no", None, torch.tensor(True)):
        with pytest.raises(TypeError, match="flip must be True or False, got"):
            model.flip = wrong
    assert model.flip is True


def test_a_training_step_of_what_was_made_in_inference_mode():
    backbone = TinyBackbone()
    with torch.inference_mode():
        model = CASN(backbone, forward=tiny_forward, input_size=(48, 24), hidden_dim=16)
        imgs, pids = torch.rand(4, 3, 48, 24), PIDS.clone()
    output = model(imgs, pids, **LOSSES)
    (output.masked_scores.sum() + output.pair_scores.sum() + output.distances.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.pair_classifier.parameters())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (torch.inference_mode, r"outside of torch\.inference_mode.*'features\.0\.weight'"),
        (lambda: torch.device("meta"), r"'features\.0\.weight' is on the meta device: .*to_empty"),
    ],
)
def test_a_backbone_that_computes_no_gradient_is_refused(place, message):
    with place():
        backbone = TinyBackbone()
    with pytest.raises(ValueError, match=message):
        CASN(backbone, forward=tiny_forward)


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
