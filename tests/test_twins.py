"""A network that stays as it is, by whatever the original reaches its layers."""

import copy
import weakref
from collections import deque
from functools import partial

import pytest
import torch
from conftest import PIDS, TinyBackbone, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from casn_plugin import CASN, IdentificationAttentionLoss
from casn_plugin.export import traced_encoder
from casn_plugin.twins import evaluated, twin


class Reaching(TinyBackbone):
    """Reaches its convolutions by a way of its own, `go`, maybe checkpointed."""

    checkpointed = False

    def __init__(self, way):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        way(self)

    def forward(self, imgs):
        maps = checkpoint(self.go, imgs, use_reentrant=False) if self.checkpointed else None
        maps = self.go(imgs) if maps is None else maps
        features = self.embed(self.global_avgpool(self.relu(maps)).flatten(1))
        return self.classifier(features), features

    def go(self, imgs):
        for step in self.steps:
            imgs = step(imgs)
        return imgs

    def all_of(self, imgs, steps=()):
        for step in steps:
            imgs = step(imgs)
        return imgs


def by_default(net):
    def go(imgs, features=net.features, *, last=net.features[-1]):
        for step in features[:-1]:
            imgs = step(imgs)
        return last(imgs)

    net.go = go


def by_closure(net, unset=False):
    if unset:
        layer = None  # an empty cell is no obstacle
        del layer
    net.go = lambda imgs: net.features(imgs) if net is not None else layer


def by_hook(net):
    net.pre = nn.Identity()
    net.steps = [net.pre]
    net.pre.register_forward_hook(lambda _, __, given: net.features(given))


def by_weakref(net):
    features = weakref.ref(net.features)
    net.go = lambda imgs: features()(imgs)


WAYS = {
    "list": lambda net: setattr(net, "steps", list(net.features)),
    "tuple": lambda net: setattr(net, "steps", tuple(net.features)),
    "deque": lambda net: setattr(net, "steps", deque(net.features)),
    "dict": lambda net: setattr(net, "steps", {step: 1 for step in net.features}),
    "nested": lambda net: setattr(net, "steps", [{"one": [net.features]}["one"][0]]),
    "unregistered": lambda net: setattr(net, "steps", [nn.Sequential(*net.features)]),
    "lambda": by_closure,
    "unset": partial(by_closure, unset=True),
    "default": by_default,
    "hook": by_hook,
    "method": lambda net: setattr(net, "steps", [net.features.forward]),
    "partial": lambda net: setattr(net, "go", partial(net.all_of, steps=[net.features])),
    "weakref": by_weakref,
}


def reaching(way, **options) -> CASN:
    torch.manual_seed(0)
    return CASN(Reaching(way), forward=Reaching.forward, input_size=(48, 24), **options)


@pytest.mark.parametrize("way", WAYS)
def test_a_network_in_training_mode_encodes_as_in_eval_mode(way):
    model = reaching(WAYS[way])
    imgs = torch.rand(4, 3, 48, 24)
    model(imgs + 1)  # statistics that are not those of the batch
    expected = model.eval().encode(imgs)
    model.train()
    modes, before = state_of(model), copy.deepcopy(dict(model.named_buffers()))
    found = model.encode(imgs)
    torch.testing.assert_close(found.features, expected.features)
    torch.testing.assert_close(found.maps, expected.maps)
    assert state_of(model) == modes
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("way", ["list", "lambda", "hook"])
def test_what_is_computed_again_is_found_by_any_way(way):
    gradients = []
    for checkpointed in (False, True):
        model = reaching(WAYS[way])
        model.backbone.checkpointed = checkpointed
        imgs = torch.rand(4, 3, 48, 24, generator=torch.Generator().manual_seed(0))
        model(imgs, PIDS, IdentificationAttentionLoss()).masked_scores.mean().backward()
        gradients.append([parameter.grad for parameter in model.backbone.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0][0].abs().max() > 0


class Holding:
    """An object that holds a layer where nobody looks."""

    def __init__(self, held):
        self.held = held

    def __call__(self, imgs):
        return self.held(imgs)


def test_a_network_that_leaves_its_twin_is_refused_or_run_itself():
    model = reaching(lambda net: setattr(net, "steps", [Holding(net.features)]))
    imgs = torch.rand(4, 3, 48, 24)
    before = model.backbone.features[1].num_batches_tracked.item()
    for encode in (model.encode, lambda _: traced_encoder(model)):
        with pytest.raises(ValueError, match=r"it called 'features' by something else: .*eval\(\)"):
            encode(imgs)
    assert model.training and model.backbone.features[1].num_batches_tracked == before
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    expected = reaching(WAYS["list"])(imgs, PIDS, IdentificationAttentionLoss()).masked_scores
    found = model(imgs, PIDS, IdentificationAttentionLoss()).masked_scores
    torch.testing.assert_close(found, expected)
    model.backbone.checkpointed = True
    with pytest.raises(ValueError, match=r"gradient checkpointing .* reach its layers by"):
        model(imgs, PIDS, IdentificationAttentionLoss())
    assert model.eval().encode(imgs).features.shape == (4, 6)


def test_what_leads_to_no_layer_is_shared():
    net = TinyBackbone()
    net.log, net.count, net.outer = [1], {"a": 2}, [nn.Linear(2, 2)]
    net.note = lambda x, seen=net.log: seen.append(x)
    with twin(net) as other:
        assert all(
            vars(other)[name] is vars(net)[name] for name in ("log", "count", "outer", "note")
        )
    with evaluated(net.eval()) as other:
        assert other is net


def test_what_was_compiled_runs_uncompiled():
    net = TinyBackbone()
    net.go = torch.compile(net.features.forward, backend="eager")
    net.layer = torch.compile(net.features, backend="eager")
    imgs = torch.rand(2, 3, 48, 24)
    expected = copy.deepcopy(net.features).eval()(imgs)
    with twin(net) as other:
        other.eval()
        for run in (other.go, other.layer):
            torch.testing.assert_close(run(imgs), expected)
    assert net.features[1].num_batches_tracked == 0
