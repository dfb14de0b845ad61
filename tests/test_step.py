"""What a training step asks of the device, and the tools that look at it or compile it."""

import copy
import json

import pytest
import torch
from conftest import build_backbone
from engines import SIZE, make_engine
from starting import start
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from casn_plugin import (
    CASN,
    BatchPairs,
    IdentificationAttentionLoss,
    SiameseAttentionLoss,
)
from casn_plugin.losses import identification_loss
from casn_plugin.objective import MetricOptions, loss_terms

PIDS = torch.tensor([0, 0, 3, 4, 2, 2, 1, 4])
IA = IdentificationAttentionLoss()


def loss_of(model, imgs, pids=PIDS, siamese=None, camids=None):
    """The loss of a loop of one's own; `siamese` None: L_ide alone."""
    output = model(imgs, pids, siamese and IA, siamese, camids)
    loss_ide = identification_loss(output.logits, pids)
    return loss_terms(output, pids, loss_ide, siamese=siamese)[0]


def network(name, size=SIZE, depth=12):
    """A network of torchreid, or one of timm without dropout: a transformer of so many blocks."""
    if not name.startswith("timm:"):
        return CASN(build_backbone(name), input_size=size, hidden_dim=16).train()
    timm = pytest.importorskip("timm")
    options = {"img_size": size, "depth": depth} if "vit" in name else {}
    net = timm.create_model(name.removeprefix("timm:"), num_classes=5, drop_rate=0.0, **options)
    return CASN(net, input_size=size, hidden_dim=16).train()


@pytest.fixture
def on_meta(lab):
    """The laboratory's device that nothing can be read from, and what counts reads."""
    reads = lab("device_reads")
    return reads.META, reads.Reads


def spread(features, pids):
    """A metric loss that reads nothing."""
    return (features * pids[:, None]).square().mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"siamese": SiameseAttentionLoss(pairs=BatchPairs())},
        {"accumulate": 2},
        {"metric": MetricOptions(metric_loss=spread)},
        {"identification": IdentificationAttentionLoss("logit", trains="network")},
        {"optimize": lambda model: torch.optim.AdamW(model.parameters())},
    ],
    ids=["rows", "chosen pairs", "parts", "metric loss", "network", "AdamW"],
)
def test_a_step_of_the_engine_reads_the_device_once(market_root, monkeypatch, options, on_meta):
    meta, counted = on_meta
    engine = make_engine(market_root, **options)
    engine.casn.to(meta)
    engine.criterion.use_gpu = True
    monkeypatch.setattr(type(engine), "_device", meta)
    data = next(iter(engine.train_loader))
    for _ in range(2):
        with counted() as reads:
            terms = engine.forward_backward(data)
        assert reads.calls == ["tolist"]
        assert {"loss_ide", "loss_ia", "loss_sa"} <= set(terms)


@pytest.mark.parametrize("name", ["osnet_x0_25", "pcb_p6", "timm:vit_tiny_patch16_224"])
def test_forward_and_backward_read_nothing_of_the_device(name, on_meta):
    meta, counted = on_meta
    model = network(name, (64, 32)).to(meta)
    imgs, camids = torch.rand(8, 3, 64, 32, device=meta), torch.arange(8) % 2
    for siamese in (SiameseAttentionLoss(), SiameseAttentionLoss(pairs=BatchPairs("all"))):
        with counted() as reads:
            loss_of(model, imgs, PIDS, siamese, camids).backward()
        assert not reads.calls
        with counted() as reads:  # identities that are on the device already are read once
            loss_of(model, imgs, PIDS.to(meta), siamese, camids).backward()
        assert reads.calls == ["cpu"]


def test_what_is_counted_as_a_read(on_meta):
    meta, counted = on_meta
    there = torch.rand(3, device=meta)
    with counted() as reads:
        bool(there[0]), int(there[0]), there[0].item(), there.tolist(), there.cpu(), float(there[0])
    assert len(reads.calls) == 6
    with counted(), pytest.raises(NotImplementedError):
        there.nonzero()
    with counted(), pytest.raises(NotImplementedError):
        there.to("cpu")
    with counted(), pytest.raises(RuntimeError, match="where got tensors of cpu and meta"):
        torch.where(torch.ones(3).bool(), there, there)


def flops_of(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "above"), [("resnet18", 0.01), ("timm:vit_tiny_patch16_224", 0.12)]
)
def test_flops_of_a_step_are_at_the_floor(name, above):
    """The floor: the step itself, and a pass of images to and fro that trains no weight."""
    model = network(name, (64, 32))
    imgs = torch.rand(8, 3, 64, 32)
    plain = flops_of(lambda: loss_of(model, imgs).backward())
    frozen = copy.deepcopy(model.backbone).requires_grad_(False)
    masked = flops_of(lambda: frozen(imgs.clone().requires_grad_()).sum().backward())
    rows, chosen = (
        flops_of(lambda siamese=siamese: loss_of(model, imgs, siamese=siamese).backward())
        for siamese in (SiameseAttentionLoss(), SiameseAttentionLoss(pairs=BatchPairs()))
    )
    assert plain + masked < rows < (1 + above) * (plain + masked)
    assert chosen == rows


def test_flops_are_counted_layer_by_layer():
    model, imgs = network("osnet_x0_25", (64, 32)), torch.rand(8, 3, 64, 32)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, imgs, siamese=SiameseAttentionLoss()).backward()
    counted = counter.get_flop_counts()
    assert {"CASN.conv1.conv", "CASN.pair_classifier.0"} <= set(counted)
    assert flops_of(lambda: model.encode(imgs)) > 0


def test_the_profiler_takes_a_step():
    model, imgs = network("osnet_x0_25", (64, 32)), torch.rand(8, 3, 64, 32)
    counts = []
    for siamese in (None, SiameseAttentionLoss()):
        with profile(
            activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True
        ) as seen:
            loss_of(model, imgs, siamese=siamese).backward()
        counts.append({each.key: each.count for each in seen.key_averages()})
    plain, whole = counts
    for name in ("aten::convolution", "aten::convolution_backward"):
        assert whole[name] == 2 * plain[name]  # of the images, and of the masked images


def gradients(model, called, imgs):
    model.zero_grad()
    loss_of(called, imgs, siamese=SiameseAttentionLoss()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_equally(model, other, compiled):
    """Two steps of one model, and of a copy that is compiled."""
    for seed in range(2):
        imgs = torch.rand(8, 3, 64, 32, generator=torch.Generator().manual_seed(seed))
        expected, found = gradients(model, model, imgs), gradients(other, compiled, imgs)
        assert expected.keys() == found.keys()
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-6, msg=name)
        for each, value in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(value, each)


COMPILED = ["resnet18", "timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224"]


@pytest.fixture
def compiler():
    """The compiler, with nothing compiled before and after."""
    torch.compiler.reset()
    yield torch._dynamo
    torch.compiler.reset()


def test_graph_breaks():
    pytest.importorskip("timm")
    output, errors = start(
        "count_breaks", "resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"
    ).communicate(timeout=240)
    assert [json.loads(line)["train"] for line in output.splitlines()] == [[1, 0]] * 3, errors
    assert [json.loads(line)["eval"] for line in output.splitlines()] == [[4, 3]] * 3, errors


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_trains_as_it_does(name, compiler):
    model = network(name, (64, 32), depth=4)
    other = copy.deepcopy(model)
    assert_trains_equally(model, other, torch.compile(other, backend="aot_eager"))
    compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(other.eval(), backend="aot_eager")
        for _ in range(2):
            imgs = torch.rand(8, 3, 64, 32)
            torch.testing.assert_close(compiled(imgs), other(imgs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("timm:vit_tiny_patch16_224", [f"blocks.{number}" for number in range(3)]),
    ],
)
def test_layers_before_the_map_can_be_compiled(name, layers, compiler):
    model = network(name, (64, 32), depth=4)
    other = copy.deepcopy(model)
    for layer in layers:
        other.get_submodule(layer).compile(backend="aot_eager")
    compiler.utils.counters.clear()
    assert_trains_equally(model, other, other)
    assert compiler.utils.counters["stats"]["unique_graphs"] > 0
    assert compiler.utils.counters["stats"].get("graph_break", 0) == 0
