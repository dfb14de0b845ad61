"""What is tapped of the families of timm and torchvision, against a table written by hand."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from conftest import PIDS, state_of
from families import FAMILIES, Family
from torch import nn

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    PairClassifier,
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
    return {name: value.clone() for name, value in network.named_buffers() if name.endswith(names)}


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
    assert model.preprocessing.size == family.size

    network.eval()
    imgs = torch.randn(4, 3, *family.size)
    expected = plain_pass(family, network, imgs)
    logits, features, maps = model.reader.tapped(network, imgs)
    assert maps.shape == (4, *family.map) and features.shape == (4, family.features)
    torch.testing.assert_close(maps, family.map_of(expected[family.at]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-3, atol=1e-5)

    attention = torch.cat([
        siamese_attention(PairClassifier(family.features, 8, seed=seed), features, maps)
        for seed in range(6)
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
        expected = reference.distance_of_rows(
            model.pair_classifier, features, captured.require(), 0, j, threshold=0.2
        )
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
        (maps,), (gradients,) = (
            cam.activations_and_grads.activations, cam.activations_and_grads.gradients
        )  # fmt: skip
        weights = cam.get_cam_weights(imgs, None, None, maps.numpy(), gradients.numpy())
        theirs = (weights[..., None, None] * maps.numpy()).sum(1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).relu(), rtol=1e-4, atol=1e-6)


def vit(**options) -> nn.Module:
    import timm

    options = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)


def test_images_of_other_sizes_where_the_network_takes_them():
    network = vit(dynamic_img_size=True)
    model = CASN(network, hidden_dim=16)
    assert model.preprocessing.size == (64, 64)
    assert model(torch.randn(2, 3, 128, 64)).activations.shape == (2, 48, 8, 4)
    assert model.eval().encode(torch.randn(2, 3, 64, 96)).maps.shape == (2, 48, 4, 6)


def test_a_network_says_for_which_size_it_is_made():
    assert CASN(vit(img_size=(128, 64)), hidden_dim=16).preprocessing.size == (128, 64)
    with pytest.raises(ValueError, match=r"not take an image of 32x32.*input_size=\(rows, columns"):
        CASN(vit(), input_size=(32, 32))


def test_reshape_reads_the_tokens_of_a_named_layer():
    network = vit()
    expected = CASN(network, hidden_dim=16).eval()
    model = CASN(
        network,
        target_layer="blocks.2.norm1",
        reshape=lambda x: x[:, 1:].reshape(len(x), 4, 4, 48).permute(0, 3, 1, 2),
        hidden_dim=16,
    ).eval()
    imgs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.encode(imgs).maps, expected.encode(imgs).maps)
    outputs = [
        each.train()(imgs, siamese=SiameseAttentionLoss()).distances for each in (model, expected)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="must only move values"):
        CASN(network, target_layer="blocks.2.norm1", reshape=lambda x: x.mean(2)[:, 1:, None, None])


@pytest.mark.parametrize("layer", ["blocks.2", "norm"])
def test_tokens_that_the_class_token_does_not_see_are_refused(layer):
    with pytest.raises(ValueError, match=rf"'{layer}'.*do not depend.*blocks\.2\.norm1 \(48x4x4\)"):
        CASN(vit(), target_layer=layer)


class Shuffled(nn.Module):
    """Tokens in columns instead of rows, averaged."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.fc = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, imgs):
        tokens = self.mix(self.embed(imgs).mT.flatten(2).mT)
        return self.fc(tokens.mean(1))


def test_tokens_in_another_order_are_not_taken_for_a_map():
    model = CASN(Shuffled(), input_size=(64, 64), hidden_dim=16)
    assert model.reader.target_layer == "embed"  # the last map that is one
    with pytest.raises(ValueError, match=r"'mix' gave \(2, 64, 8\).*reshape.*embed \(8x8x8\)"):
        CASN(Shuffled(), input_size=(64, 64), target_layer="mix")


class Branches(nn.Module):
    """Two maps side by side; of their sum the features come, or of both."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 1),
                                            nn.Conv2d(8, 8, 1))  # fmt: skip
        self.act, self.fc, self.joined = nn.ReLU(), nn.Linear(8 if joined else 16, 5), joined

    def forward(self, imgs):
        stem = self.stem(imgs)
        left, right = self.left(stem), self.right(stem)
        if self.joined:
            return self.fc(self.act(left + right).mean((2, 3)))
        return self.fc(torch.cat([left.mean((2, 3)), right.mean((2, 3))], 1))


def test_a_map_beside_which_features_have_another_source_is_not_taken():
    assert CASN(Branches(True), input_size=(64, 32), hidden_dim=16).reader.target_layer == "act"
    assert CASN(Branches(False), input_size=(64, 32), hidden_dim=16).reader.target_layer == "stem"


class Reading(nn.Module):
    """A class token that reads normed tokens of one or of two grids of patches."""

    def __init__(self, grids: int) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Conv2d(3, 8, 8 * (i + 1), 8 * (i + 1)) for i in range(grids))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(grids))
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8 * grids, 5)

    def forward(self, imgs):
        read = []
        for embed, norm in zip(self.embeds, self.norms, strict=True):
            patches = embed(imgs).flatten(2).mT
            tokens = torch.cat([self.token + patches.mean(1, keepdim=True), patches], 1)
            normed = norm(tokens)
            weights = (normed[:, :1] @ normed.mT).softmax(2)
            read.append((tokens[:, :1] + weights @ normed)[:, 0])
        return self.fc(torch.cat(read, 1))


def test_tokens_of_one_of_two_branches_are_not_taken():
    reader = CASN(Reading(1), input_size=(64, 64), hidden_dim=16).reader
    assert (reader.target_layer, reader.tap.layout.prefix) == ("norms.0", 1)
    with pytest.raises(ValueError, match=r"no layer of Reading.*norms\.0 \(8x8x8\)"):
        CASN(Reading(2), input_size=(64, 64), hidden_dim=16)


def test_a_layer_that_is_called_for_several_tensors_is_not_tapped():
    act = nn.Sigmoid()
    layers = (nn.Conv2d(3, 8, 8, 8), act, nn.Conv2d(8, 8, 1), act)
    network = nn.Sequential(*layers, nn.Conv2d(8, 6, (8, 4)), nn.Flatten(), nn.Linear(6, 5))
    reader = CASN(network, input_size=(64, 32), hidden_dim=16).reader
    assert (reader.target_layer, reader.at) == ("4", "input")


def test_a_map_of_one_position_is_refused():
    with pytest.raises(ValueError, match=r"'global_pool.pool', 512x1x1, has one position only"):
        CASN(small("resnet10t", "(B, C, H, W)").build(), target_layer="global_pool.pool")


def test_channels_that_both_readings_fit_are_told_by_pooling_or_layers():
    class Square(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 8, 8), last
            self.norm = nn.Identity() if last else nn.LayerNorm(8)  # which tells nothing
            self.fc = nn.Linear(512 if last is None else 8, 5)

        def forward(self, imgs):
            maps = self.norm(self.stem(imgs).permute(0, 2, 3, 1))
            return self.fc(maps.flatten(1) if self.last is None else maps.mean((1, 2)))

    for last in (True, None):
        reader = CASN(Square(last), input_size=(64, 64), hidden_dim=16).reader
        assert (reader.target_layer, reader.tap.layout.kind) == ("norm", "channels last")


def test_a_network_without_classifier_gives_features_alone():
    import timm

    network = timm.create_model("resnet10t", num_classes=0)
    model = CASN(network, input_size=(64, 64), hidden_dim=16)
    imgs = torch.randn(2, 3, 64, 64)
    output = model(imgs, siamese=SiameseAttentionLoss())
    assert output.logits is None and output.distances.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(imgs), network(imgs))


def test_a_network_that_cannot_be_read_lists_candidates():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 64, 64), nn.Linear(8, 5)

        def forward(self, imgs):
            return self.fc(self.conv(imgs).flatten(1))

    with pytest.raises(ValueError, match=r"no layer of Loop.*candidates: conv \(2, 8, 1, 1\)"):
        CASN(Loop(), input_size=(64, 64))
    with pytest.raises(TypeError, match="Sequential.*does not end in a classifier.*forward="):
        CASN(nn.Sequential(Loop(), nn.Softmax(1)), input_size=(64, 64))


def test_features_of_training_are_what_the_classifier_takes_under_dropout():
    network = vit(drop_rate=0.5)
    model = CASN(network, hidden_dim=16).train()
    output = model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(network.head(output.features), output.logits)


def test_attention_kernels_are_those_of_before_at_every_step():
    backends = torch.backends.cuda
    family = small("vit_tiny_patch16_224", 1)
    model = CASN(family.build(), hidden_dim=16)
    flags = [layer.fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")]
    assert any(flags) and backends.flash_sdp_enabled()
    seen = []
    for block in model.backbone.blocks:
        block.attn.register_forward_pre_hook(lambda *_: seen.append(backends.flash_sdp_enabled()))
    model(torch.randn(4, 3, 64, 64), PIDS, IdentificationAttentionLoss(), SiameseAttentionLoss())
    # fused wherever no second derivative is needed: before the map, and in the masked pass
    assert seen == [True, True, False, True, True, True]
    assert backends.flash_sdp_enabled()
    assert flags == [layer.fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "VisionTransformer"])
def test_copies_modes_autocast_and_threads_change_nothing(name):
    family = small(name, 1)
    model = CASN(family.build(), input_size=family.size, hidden_dim=16)
    imgs = torch.randn(2, 3, *family.size)
    expected = model.eval().encode(imgs)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for other in (copied, model.train()):
        torch.testing.assert_close(other.encode(imgs).maps, expected.maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(imgs, siamese=SiameseAttentionLoss())
        found = model.encode(imgs)
    assert output.activations.dtype == torch.float32 and output.distances.isfinite().all()
    torch.testing.assert_close(found.features, expected.features, rtol=0.1, atol=0.1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(model.encode, [imgs] * 8):
            torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-5)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_features_of_a_vit_are_exported_and_traced():
    model = CASN(vit(), hidden_dim=16).eval()
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(imgs)
        exported = torch.export.export(model, (imgs,), strict=False).module()
        torch.testing.assert_close(exported(imgs), expected)
        torch.testing.assert_close(torch.jit.trace(model, imgs)(imgs), expected)
