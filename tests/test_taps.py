"""What is tapped of the families of timm and torchvision, against a table written by hand."""

import pytest
import reference
import torch
from conftest import PIDS, state_of
from families import FAMILIES, Family
from torch import nn

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    SiameseAttentionLoss,
    attention_distmat,
    grad_cam,
)
from casn_plugin.attention import siamese_attention

pytest.importorskip("timm")


def title(family: Family) -> str:
    return f"{family.library}-{family.name}-{family.tensor}"


def plain_pass(family: Family, network: nn.Module, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer of the table takes and gives, and the network's output, by plain hooks."""
    seen = {}

    def look(_, args, output):
        seen.update(input=args[0].clone(), output=output.clone())  # before layers in place

    handle = network.get_submodule(family.layer).register_forward_hook(look)
    seen["logits"] = network(imgs)
    handle.remove()
    return seen


def statistics_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """What BatchNorm layers have learnt of images."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {
        name: value.clone() for name, value in network.named_buffers() if name.endswith(names)
    }


def test_the_table_is_of_many_families():
    names = {(family.library, family.name.split("_")[0]) for family in FAMILIES}
    assert len(names) >= 45


@pytest.mark.parametrize("family", FAMILIES, ids=title)
def test_what_is_tapped_is_what_the_table_says(family):
    network = family.build()
    network.train()
    before = state_of(network)
    statistics = statistics_of(network)
    model = CASN(network, input_size=family.size, hidden_dim=16)
    assert state_of(network) == before and network.training
    torch.testing.assert_close(statistics_of(network), statistics, rtol=0, atol=0)
    assert (model.reader.target_layer, model.reader.at) == (family.layer, family.at)
    assert model.input_size == family.size

    network.eval()
    imgs = torch.randn(4, 3, *family.size)
    expected = plain_pass(family, network, imgs)
    logits, features, maps = model.reader.tapped(network, imgs)
    assert maps.shape == (4, *family.map) and features.shape == (4, family.features)
    torch.testing.assert_close(maps, family.map_of(expected[family.at]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-3, atol=1e-5)

    classifier = model.pair_classifier
    attention = torch.cat([
        siamese_attention(scorer, features, maps)
        for scorer in (classifier, lambda pairs: classifier(pairs).flip(1))
    ])  # fmt: skip
    assert attention.isfinite().all()
    assert (attention.amax((1, 2)) > attention.amin((1, 2))).any(), "attention is constant"
    assert state_of(network)[1] == before[1]


def small(name: str, tensor: object) -> Family:
    return next(each for each in FAMILIES if each.name == name and each.tensor == tensor)


TRAINED = [
    small("resnet10t", "(B, C, H, W)"),
    small("vit_tiny_patch16_224", 1),
    small("deit_tiny_distilled_patch16_224", 2),
    small("swin_tiny_patch4_window7_224", "(B, H, W, C)"),
]


@pytest.mark.parametrize("family", TRAINED, ids=title)
def test_both_losses_train_the_network(family):
    model = CASN(family.build(), input_size=family.size, hidden_dim=16)
    model.train()
    imgs = torch.randn(4, 3, *family.size)
    output = model(imgs, PIDS, IdentificationAttentionLoss(), SiameseAttentionLoss())
    first = next(p for p in model.backbone.parameters() if p.ndim == 4)
    for loss in (output.masked_scores.mean(), output.distances.sum()):
        (gradient,) = torch.autograd.grad(loss, first, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("family", TRAINED, ids=title)
def test_ranking_agrees_with_autograd_pair_by_pair(family):
    network = family.build().double().eval()
    model = CASN(network, input_size=family.size, hidden_dim=16).eval()
    imgs = torch.randn(3, 3, *family.size, dtype=torch.float64)
    encoding = model.encode(imgs)
    features = model(imgs)
    torch.testing.assert_close(encoding.features, features)
    distmat = attention_distmat(model, encoding[:1], encoding)
    assert distmat[0, 0] <= 1e-6
    with model.reader.capture(network) as captured:
        features = model.reader.features(network, imgs)
    for j in (1, 2):
        alpha = reference.indicator(
            model.pair_classifier, features[0].detach(), features[j].detach()
        )
        maps = [
            reference.grad_cam((alpha * features[i]).sum(), captured.require(), i).numpy()
            for i in (0, j)
        ]
        expected = reference.attention_distance(*maps, threshold=0.2)
        assert distmat[0, j].item() == pytest.approx(expected, abs=1e-8)
    assert distmat.max() > 1e-3


def test_maps_of_a_vit_are_those_of_pytorch_grad_cam():
    public = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = small("vit_tiny_patch16_224", 1).build().eval()
    model = CASN(network, hidden_dim=16)
    imgs = torch.randn(2, 3, 64, 64)
    tapped = model.reader.tapped(network, imgs)
    ours = grad_cam(tapped.logits[:, 3], tapped.activations).detach()
    with public.GradCAM(
        model=network,
        target_layers=[network.blocks[-1].norm1],
        reshape_transform=lambda x: x[:, 1:].reshape(2, 4, 4, 48).permute(0, 3, 1, 2),
    ) as cam:
        cam(imgs, [ClassifierOutputTarget(3)] * 2)
        weights = cam.get_cam_weights(
            imgs, None, None, *(cam.activations_and_grads.activations[0].numpy(),
            cam.activations_and_grads.gradients[0].numpy()),
        )  # fmt: skip
        theirs = (weights[..., None, None] * cam.activations_and_grads.activations[0].numpy()).sum(1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).relu(), rtol=1e-4, atol=1e-6)
