"""What touches a network and leaves it as found."""

import copy
import threading

import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn

from casn_plugin.attention import grad_cam
from casn_plugin.hooks import (
    capture,
    constant_parameters,
    evaluating,
    frozen_batchnorm,
    place_of,
    unwrapped,
)


@pytest.fixture
def backbone() -> TinyBackbone:
    return TinyBackbone().double().eval()


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.rand(4, 3, 48, 24, dtype=torch.float64)


@pytest.mark.parametrize("at", ["input", "output"])
def test_capture_survives_in_place_layers(imgs, at):
    """The recorded map is the one before the in-place layer, and its gradient is right."""
    conv = nn.Conv2d(3, 8, 3, stride=4).double()
    net = nn.Sequential(conv, nn.Identity(), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    expected = conv(imgs)
    assert (expected < 0).any()
    with capture(net[1], at=at) as captured:
        out = net(imgs)
    torch.testing.assert_close(captured.require(), expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), captured.require())
    torch.testing.assert_close(gradient, (expected > 0).double() / expected[0, 0].numel())


def test_capture_leaves_no_hook_behind_after_an_exception(backbone, imgs):
    with pytest.raises(RuntimeError, match="mid-way"), capture(backbone.features):
        raise RuntimeError("mid-way")
    assert not backbone.features._forward_hooks and not backbone.features._forward_pre_hooks


def test_capture_rejects_another_place(backbone, unchecked):
    with pytest.raises(ValueError, match="at must be"), capture(backbone.features, at="inside"):
        pass


def test_capture_gives_a_frozen_map_a_gradient(backbone, imgs):
    backbone.features.requires_grad_(False)
    with capture(backbone.features) as captured:
        logits, _ = tiny_forward(backbone, imgs)
    assert grad_cam(logits[:, 0], captured.require()).shape == (4, 6, 3)


def test_capture_of_the_head_only_keeps_no_graph_of_the_backbone(backbone, imgs):
    with torch.no_grad():
        with capture(backbone.features, head_only=True) as captured:
            _, features = tiny_forward(backbone, imgs)
        assert captured.require().is_leaf and features.requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not torch.is_grad_enabled()


def test_capture_keeps_threads_apart(backbone):
    """Replicas of nn.DataParallel share their hooks: each thread must see its own map."""
    inputs = [torch.full((1, 3, 48, 24), float(i), dtype=torch.float64) for i in range(8)]
    expected = [backbone.features(each).detach() for each in inputs]
    barrier, seen = threading.Barrier(8), [None] * 8

    def work(i: int) -> None:
        with capture(backbone.features) as captured:
            barrier.wait()
            tiny_forward(backbone, inputs[i])
            barrier.wait()
        seen[i] = captured.require().detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    assert not backbone.features._forward_hooks


def test_capture_takes_the_first_tensor_of_a_tuple():
    class Two(nn.Module):
        def forward(self, x):
            return x * 2, x * 3

    with capture(Two()) as captured:
        pass
    assert captured.activations is None
    with pytest.raises(ValueError, match="not called"):
        captured.require()
    layer = Two()
    with capture(layer) as captured:
        first, second = layer(torch.ones(1, 2, 3, 3))
    assert captured.require().max() == 2 and first.max() == 2 and second.max() == 3
    with capture(layer) as captured:
        layer(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\).*\(1, 2\)"):
        captured.require()


def test_capture_under_autocast_is_in_float32(backbone):
    backbone.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with capture(backbone.features) as captured:
            logits, _ = tiny_forward(backbone, torch.rand(2, 3, 48, 24))
        maps = grad_cam(logits[:, 0], captured.require())
    assert logits.dtype == torch.bfloat16
    assert captured.require().dtype == maps.dtype == torch.float32


def test_frozen_batchnorm_keeps_statistics_and_flags(backbone, imgs):
    norm = backbone.features[1].train()
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError), frozen_batchnorm(backbone):
        frozen = backbone.features[:2](imgs)
        raise RuntimeError
    assert norm.track_running_stats and norm.num_batches_tracked == 0
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    torch.testing.assert_close(frozen, backbone.features[:2](imgs))  # batch statistics in both
    assert not torch.equal(norm.running_mean, before)


def test_frozen_batchnorm_by_running_statistics(backbone, imgs, unchecked):
    norm = backbone.features[1].train()
    norm.running_mean.add_(3)
    before, expected = norm.running_mean.clone(), copy.deepcopy(backbone).eval().features[:2](imgs)
    with frozen_batchnorm(backbone, "running"):
        torch.testing.assert_close(backbone.features[:2](imgs), expected, rtol=0, atol=0)
    assert norm.training and norm.track_running_stats
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    with (
        pytest.raises(ValueError, match="'batch' or 'running', got 'none'"),
        frozen_batchnorm(norm, "none"),
    ):
        pass


@pytest.mark.parametrize("replica", [False, True])
def test_constant_parameters_pass_gradients_on_and_are_left_as_found(backbone, imgs, replica):
    network, imgs = backbone, imgs.requires_grad_()
    if replica:  # as nn.DataParallel makes them: tensors with a graph where parameters were
        network = copy.deepcopy(backbone)
        for layer in network.modules():
            layer._former_parameters = {name: value * 1 for name, value in layer._parameters.items()
                                        if value is not None}  # fmt: skip
            layer._parameters.clear()
            vars(layer).update(layer._former_parameters)
    expected = tiny_forward(network, imgs)[0]
    found = {name: dict(vars(layer)) for name, layer in network.named_modules()}
    with pytest.raises(RuntimeError), constant_parameters(network):
        logits = tiny_forward(network, imgs)[0]
        raise RuntimeError
    assert found == {name: vars(layer) for name, layer in network.named_modules()}
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    weights = [value for layer in network.modules()
               for value in (layer._former_parameters if replica else layer._parameters).values()
               if value is not None]  # fmt: skip
    assert len(weights) > 4
    passed = torch.autograd.grad(logits.sum(), [imgs, *weights], allow_unused=True)
    assert passed[1:] == (None,) * len(weights)
    direct = torch.autograd.grad(expected.sum(), [imgs, *weights])
    torch.testing.assert_close(passed[0], direct[0], rtol=0, atol=0)


def test_every_layer_gets_its_own_mode_back_after_an_exception(backbone):
    backbone.features[1].train()
    modes = [layer.training for layer in backbone.modules()]
    with pytest.raises(RuntimeError), evaluating(backbone):
        assert not any(layer.training for layer in backbone.modules())
        raise RuntimeError
    assert [layer.training for layer in backbone.modules()] == modes and any(modes)


def test_parallel_wrappers_are_seen_through(backbone):
    assert unwrapped(nn.DataParallel(backbone)) is unwrapped(backbone) is backbone


def test_the_place_of_a_module_is_that_of_its_first_parameter(backbone):
    assert place_of(backbone) == (torch.device("cpu"), torch.float64)
    default = torch.empty(0, dtype=torch.float16)
    assert place_of(nn.ReLU(), default).dtype == torch.float16
    assert place_of(nn.ReLU()).dtype == torch.float32
