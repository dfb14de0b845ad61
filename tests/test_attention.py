"""Maps, masks, row profiles and their distance."""

import numpy as np
import pytest
import reference
import torch
from conftest import TinyBackbone, tiny_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from casn_plugin.attention import (
    align_profiles,
    attended_span,
    attention_distance,
    grad_cam,
    indicator,
    row_profiles,
    scale_maps,
    siamese_attention,
    similarity_attention,
    soft_mask,
)
from casn_plugin.hooks import capture
from casn_plugin.identities import split_pairs

profile_values = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), min_size=1, max_size=24
)


@pytest.fixture
def backbone() -> TinyBackbone:
    return TinyBackbone().double().eval()


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.rand(4, 3, 48, 24, dtype=torch.float64)


def test_grad_cam_agrees_with_the_reference(backbone, imgs):
    with capture(backbone.features) as captured:
        logits, _ = tiny_forward(backbone, imgs)
    activations = captured.require()
    scores = logits[torch.arange(4), torch.tensor([0, 1, 2, 3])]
    maps = grad_cam(scores, activations)
    assert maps.max() > 0
    for i in range(4):
        torch.testing.assert_close(
            maps[i].detach(), reference.grad_cam(scores[i], activations, i), rtol=0, atol=1e-14
        )


def test_grad_cam_agrees_with_pytorch_grad_cam(imgs):
    public = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip
    inputs = imgs.float()
    with capture(net[1]) as captured:
        logits = net(inputs)
    maps = grad_cam(logits[torch.arange(4), torch.tensor([4, 3, 2, 1])], captured.require())
    with public.GradCAM(model=net, target_layers=[net[1]]) as cam:
        theirs = cam(inputs, [ClassifierOutputTarget(pid) for pid in (4, 3, 2, 1)])
    rows, columns = inputs.shape[2:]
    ours = nn.functional.interpolate(maps[:, None].detach(), (rows, columns), mode="bilinear")[:, 0]
    assert theirs.max() > 0.5
    for mine, other in zip(ours.numpy(), theirs, strict=True):  # they rescale min to 0, max to 1
        mine = mine - mine.min()
        if other.max() > 0:
            # theirs is resized by OpenCV after scaling; ours before: compare the pattern
            assert np.corrcoef(mine.ravel(), other.ravel())[0, 1] > 0.999


def test_grad_cam_can_be_trained(backbone, imgs):
    """The gradient of a function of the maps agrees with finite differences of the weights."""
    weight = backbone.classifier.weight

    def total() -> torch.Tensor:
        with capture(backbone.features) as captured:
            logits, _ = tiny_forward(backbone, imgs)
        return grad_cam(logits[:, 1], captured.require()).pow(2).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    assert gradient.abs().max() > 0
    step = 1e-6
    with torch.no_grad():
        weight[1, 2] += step
    above = total().item()
    with torch.no_grad():
        weight[1, 2] -= 2 * step
    below = total().item()
    assert gradient[1, 2].item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_grad_cam_rejects_scores_of_another_graph():
    activations = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="do not depend"):
        grad_cam(torch.rand(2, requires_grad=True), activations)
    with pytest.raises(ValueError, match="do not depend"):
        grad_cam(torch.rand(2), activations)


def pair_classifier(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 2)).double()


def test_indicator_agrees_with_the_reference():
    classifier, features = pair_classifier(9), torch.randn(20, 9, dtype=torch.float64)
    first, second = split_pairs(features)
    alpha = indicator(classifier, first - second)
    assert set(alpha.unique().tolist()) == {0.0, 1.0} and not alpha.requires_grad
    for i in range(10):
        expected = reference.indicator(classifier, first[i], second[i])
        torch.testing.assert_close(alpha[i], expected.double(), rtol=0, atol=0)


def test_the_indicator_is_zero_where_the_gradient_is():
    """Eq. 4 asks for a positive influence: a feature without any is not attended to."""
    classifier = nn.Linear(3, 2)
    classifier.weight.data = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -2.0]])
    assert indicator(classifier, torch.randn(4, 3)).tolist() == [[1.0, 0.0, 0.0]] * 4


def test_scores_that_do_not_depend_on_the_pair_have_no_indicator():
    free = nn.Parameter(torch.zeros(3, 2))
    for constant in (lambda differences: torch.zeros(3, 2), lambda differences: free * 2):
        with pytest.raises(ValueError, match="must depend on the differences"):
            indicator(constant, torch.rand(3, 8))


def test_siamese_attention_agrees_with_the_reference_and_ignores_other_pairs(backbone, imgs):
    classifier = pair_classifier(6)
    backbone.embed[0].weight.data.abs_()
    backbone.features[3].bias.data.abs_()
    classifier[0].weight.data.neg_()

    def head(activations: torch.Tensor) -> torch.Tensor:
        return backbone.embed(activations.relu().mean((2, 3)))

    with capture(backbone.features) as captured:
        _, features = tiny_forward(backbone, imgs)
    activations = captured.require()
    maps = siamese_attention(classifier, features, activations).detach()
    assert maps.max() > 0
    for i in (0, 2):
        first, second = activations[i].detach(), activations[i + 1].detach()
        expected = reference.siamese_maps(head, classifier, first, second)
        torch.testing.assert_close(maps[i], expected[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(maps[i + 1], expected[1], rtol=0, atol=1e-14)
    order = [2, 3, 0, 1]
    with capture(backbone.features) as captured:
        _, features = tiny_forward(backbone, imgs[order])
    permuted = siamese_attention(classifier, features, captured.require()).detach()
    torch.testing.assert_close(permuted, maps[order], rtol=0, atol=1e-14)


def test_scale_maps_is_per_image_and_leaves_blank_maps_at_zero():
    maps = torch.rand(3, 4, 2, dtype=torch.float64)
    maps[1] = 0
    scaled = scale_maps(maps * torch.tensor([1e-9, 1.0, 1e9]).double()[:, None, None])
    for i in range(3):
        np.testing.assert_allclose(scaled[i], reference.scale_map(maps[i].numpy()), rtol=1e-12)
    maps = maps.requires_grad_()
    (gradient,) = torch.autograd.grad(scale_maps(maps).sum(), maps)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_mask_agrees_with_the_reference(dtype):
    maps = torch.rand(2, 5, 3).to(dtype)
    maps[1] = 0
    mask = soft_mask(maps, (20, 10), mask_scale=7.0, mask_threshold=0.4)
    assert mask.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(2):
        expected = reference.soft_mask(maps[i].double().numpy(), 20, 10, 7.0, 0.4)
        np.testing.assert_allclose(mask[i], expected, rtol=0, atol=1e-6)


@given(values=profile_values, threshold=st.floats(0, 0.99))
@settings(deadline=None, max_examples=300)
def test_alignment_agrees_with_the_reference(values, threshold):
    profile = torch.tensor(values, dtype=torch.float64)
    first, last = attended_span(profile, threshold)
    assert (int(first), int(last)) == reference.span(profile.numpy(), threshold)
    aligned = align_profiles(profile, threshold)
    expected = reference.align(profile.numpy(), threshold)
    np.testing.assert_allclose(aligned, expected, rtol=0, atol=1e-12)
    assert aligned.min() >= profile.min() and aligned.max() <= profile.max()


@given(
    values=st.lists(st.floats(0.3, 1), min_size=1, max_size=6),
    shift=st.integers(0, 6),
    other=st.integers(0, 6),
)
@settings(deadline=None)
def test_alignment_ignores_where_the_person_stands(values, shift, other):
    """The same rows at two heights in the picture are at distance zero."""
    profiles = torch.zeros(2, 12, dtype=torch.float64)
    for row, start in enumerate((shift, other)):
        profiles[row, start : start + len(values)] = torch.tensor(values, dtype=torch.float64)
    assert attention_distance(profiles[0], profiles[1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("unit", [False, True])
def test_attention_distance_agrees_with_the_reference(unit):
    maps = torch.rand(30, 9, 4, dtype=torch.float64) ** 3
    maps[3] = 0
    profiles = row_profiles(maps)
    distances = attention_distance(*split_pairs(profiles), row_threshold=0.3, unit=unit)
    swapped = attention_distance(*reversed(split_pairs(profiles)), row_threshold=0.3, unit=unit)
    torch.testing.assert_close(distances, swapped, rtol=0, atol=0)
    for i in range(15):
        pair = maps[2 * i].numpy(), maps[2 * i + 1].numpy()
        expected = reference.attention_distance(*pair, threshold=0.3, unit=unit)
        assert distances[i].item() == pytest.approx(expected, abs=1e-12)


def test_gradients_of_mask_and_distance():
    maps = (torch.rand(4, 5, 3, dtype=torch.float64) + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: soft_mask(m, (8, 6)), maps)
    assert torch.autograd.gradcheck(
        lambda m: attention_distance(*split_pairs(row_profiles(m))), maps
    )
    equal = torch.rand(1, 5, 3).repeat(2, 1, 1).requires_grad_()  # the kink at distance zero
    attention_distance(*split_pairs(row_profiles(equal))).sum().backward()
    assert equal.grad.isfinite().all()


def linear_pair_classifier() -> nn.Linear:
    """Its α is (1, 1, 0) for all pairs."""
    classifier = nn.Linear(3, 2).double()
    classifier.weight.data = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -1.0]]).double()
    return classifier


@pytest.mark.parametrize("attend", [
    lambda features, maps, **graph: grad_cam(features.sum(1), maps, **graph),
    lambda *given, **graph: siamese_attention(linear_pair_classifier(), *given, **graph),
    lambda *given, **graph: siamese_attention(
        linear_pair_classifier(), *given, torch.tensor([[0, 1], [0, 2]]), **graph),
    similarity_attention,
])  # fmt: skip
def test_maps_keep_their_own_graph_unless_they_are_asked_not_to(attend):
    """Without one they are the same, and what they were computed from can still be trained."""
    activations = torch.rand(4, 3, 6, 2, dtype=torch.float64, requires_grad=True)
    features = activations.pow(2).mean((2, 3))
    maps, constant = (
        attend(features, activations),
        attend(features, activations, create_graph=False),
    )
    assert torch.equal(maps, constant) and maps.max() > 0
    gradient, less = (
        torch.autograd.grad(each.square().sum(), activations, retain_graph=True)[0]
        for each in (maps, constant)
    )
    assert not torch.allclose(gradient, less)
    features.sum().backward()


def test_half_precision_around_does_not_reach_attention():
    """Autocast would round the weights of the maps, and the gradient whose sign is looked at."""
    activations = torch.rand(2, 3, 6, 2, requires_grad=True)
    scores, seen = activations.pow(2).mean((1, 2, 3)), []
    linear = linear_pair_classifier().float()

    def classify(differences):
        seen.append(linear(differences))
        return seen[-1]

    maps, mask = grad_cam(scores, activations), soft_mask(activations[:, 0], (12, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grad_cam(scores, activations), maps)
        assert torch.equal(soft_mask(activations[:, 0], (12, 4)), mask)
        assert indicator(classify, torch.rand(2, 3)).tolist() == [[1, 1, 0]] * 2
    assert seen[0].dtype == maps.dtype == torch.float32


def test_the_indicator_follows_a_classifier_in_half_precision_and_one_without_weights():
    class Weightless(nn.Module):
        def forward(self, differences):
            assert differences.dtype == torch.float64  # no weights say otherwise
            return torch.stack([differences[:, 0], differences.pow(2).sum(1)], dim=1)

    differences = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    half = linear_pair_classifier().to(torch.bfloat16)
    for classifier, expected in ((half, [[1, 1, 0]]), (Weightless(), [[1, 0, 1]])):
        alpha = indicator(classifier, differences)
        assert alpha.tolist() == expected and alpha.dtype == torch.float64


def test_settings_are_those_of_the_paper_unless_others_are_given():
    maps = torch.rand(2, 5, 3, dtype=torch.float64)
    for scale, asked in ((10.0, {}), (1.0, {"mask_scale": 1.0})):
        mask = soft_mask(maps, (20, 10), **asked)
        for i in range(2):
            expected = reference.soft_mask(maps[i].numpy(), 20, 10, scale, 0.5)
            np.testing.assert_allclose(mask[i], expected, rtol=0, atol=1e-12)
    distance = attention_distance(*split_pairs(row_profiles(maps)))
    expected = reference.attention_distance(maps[0].numpy(), maps[1].numpy(), 0.2, False)
    assert distance.item() == pytest.approx(expected, abs=1e-12)


def test_unit_profiles_are_of_unit_length_however_they_are_batched():
    profiles = row_profiles(torch.rand(6, 5, 3, dtype=torch.float64))
    aligned = align_profiles(profiles, unit=True)
    torch.testing.assert_close(aligned.norm(dim=1), torch.ones(6).double())
    assert torch.equal(align_profiles(profiles.view(2, 3, 5), unit=True), aligned.view(2, 3, 5))
    torch.testing.assert_close(align_profiles(profiles[0], unit=True), aligned[0])


def test_maps_of_rounding_errors_are_blank():
    scaled = scale_maps(torch.tensor([1e-15, 1e-25])[:, None, None].repeat(1, 2, 2))
    assert scaled.amax((1, 2)).tolist() == pytest.approx([1, 0], abs=1e-5)
