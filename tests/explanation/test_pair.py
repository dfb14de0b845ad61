"""A pair: the explanation says what the model computes, and leaves the model as found."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from planted import SIZE, detecting_casn, patched, tiny_casn
from torch import nn

from casn_plugin import Preprocessing, explain_pair
from casn_plugin.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from casn_plugin.ranking import pair_attention


@pytest.fixture
def detector():
    return detecting_casn()


@pytest.fixture
def tiny():
    return tiny_casn()


@pytest.mark.parametrize(("first", "second"), [((1, 0), (6, 3)), ((4, 2), (4, 1))])
def test_attention_lands_on_the_planted_patch(detector, first, second):
    found = explain_pair(detector, patched(*first), patched(*second))
    for place, image in ((first, found.first), (second, found.second)):
        assert divmod(int(image.attention.argmax()), 4) == place and image.attention.max() == 1
        assert int(image.profile.argmax()) == place[0] and image.span == (place[0], place[0])
        row, column = 8 * place[0] + 4, 8 * place[1] + 4
        np.testing.assert_allclose(image.picture[row, column], [1, 0, 0], atol=1e-6)
    # aligned, two patches are alike wherever they are
    assert found.attention_distance < 1e-6
    assert torch.allclose(found.first.aligned, torch.ones(8))

    figure = found.plot()
    shown = figure.axes[0].images[0].get_array(), figure.axes[1].images[0].get_array()
    changed = np.abs(shown[1] - shown[0]).sum(-1)
    row, column = np.unravel_index(changed.argmax(), changed.shape)
    assert (row // 8, column // 8) == first
    assert all(figure.axes[i].get_ylim() == (8, 0) for i in (0, 1, 2, 4, 5, 6))
    assert all(figure.axes[i].images[0].get_extent()[2:] == [8, 0] for i in (0, 1, 5, 6))
    lines = {line.get_ydata()[0] for line in figure.axes[1].lines}
    assert lines == {first[0], first[0] + 1}  # the span is marked around the patch's row
    drawn = figure.axes[2].lines[1]
    assert drawn.get_ydata()[int(np.argmax(drawn.get_xdata()))] == first[0] + 0.5


def test_figures_are_those_of_the_paper_by_autograd(tiny):
    tiny.eval().double()
    imgs = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    found = explain_pair(tiny, imgs[0], imgs[1], row_threshold=0.4)
    backbone = tiny.backbone
    activations = backbone.features(imgs).detach()
    maps = reference.siamese_maps(
        lambda a: backbone.embed(backbone.relu(a.clone()).mean((2, 3))),
        tiny.pair_classifier, *activations,
    )  # fmt: skip
    one, two = (each.detach().numpy() for each in maps)
    np.testing.assert_allclose(found.first.attention, reference.scale_map(one), atol=1e-12)
    np.testing.assert_allclose(found.second.attention, reference.scale_map(two), atol=1e-12)
    expected = reference.attention_distance(one, two, threshold=0.4)
    assert found.attention_distance == pytest.approx(expected, abs=1e-10)
    aligned = found.first.aligned - found.second.aligned
    assert float(aligned.norm()) == pytest.approx(expected, abs=1e-10)
    assert "more than 40% of the strongest" in found.plot().get_supxlabel()
    f1, f2 = (tiny(imgs) / tiny(imgs).norm(dim=1, keepdim=True)).detach()
    assert found.feature_distance == pytest.approx(float((f1 - f2).norm()))
    z = tiny.pair_classifier((tiny(imgs)[0] - tiny(imgs)[1])[None])[0]
    assert found.probability == pytest.approx(z.softmax(0)[1].item())


def test_pictures_paths_and_tensors_are_one(tiny, tmp_path):
    pictures = [patched(1, 1), patched(5, 2)]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    tensors = []
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
        values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
        tensors.append((values - mean) / std)
    found = [explain_pair(tiny, *each) for each in (tensors, pictures, paths, map(str, paths))]
    for other in found[1:]:
        assert other.probability == pytest.approx(found[0].probability, abs=1e-6)
        np.testing.assert_allclose(other.first.picture, np.asarray(pictures[0]) / 255, atol=1e-6)
    # resized to the model's size, or to the size that is asked for
    large = pictures[0].resize((50, 90))
    assert explain_pair(tiny, large, pictures[1]).first.picture.shape == (*SIZE, 3)
    tiny.preprocessing = Preprocessing((48, 24))
    smaller = explain_pair(tiny, large, large)
    assert smaller.first.picture.shape == (48, 24, 3)


def test_a_photo_is_turned_upright(tiny, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    patched(0, 0).save(tmp_path / "turned.png", exif=exif)
    found = explain_pair(tiny, tmp_path / "turned.png", patched(7, 3))
    np.testing.assert_array_equal(found.first.picture, found.second.picture)


def test_any_mean_and_std_is_undone(tiny):
    pair = patched(2, 1), PIL.Image.new("RGB", SIZE[::-1], (0, 255, 0))
    usual = explain_pair(tiny, *pair)
    tiny.preprocessing = Preprocessing(SIZE, (0.1, 0.5, 0.9), (1.0, 0.5, 0.25))
    found = explain_pair(tiny, *pair)
    np.testing.assert_allclose(found.first.picture, np.asarray(pair[0]) / 255, atol=1e-6)
    assert found.probability != usual.probability


def test_the_model_is_left_as_found(tiny):
    tiny.train()
    tiny.backbone.relu.eval()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    explain_pair(tiny, patched(1, 1), patched(2, 2)).plot()
    assert tiny.training and not tiny.backbone.relu.training
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny.parameters())
    assert not any(layer._forward_hooks for layer in tiny.modules())
    assert explain_pair(nn.DataParallel(tiny), patched(1, 1), patched(2, 2)).probability > 0


def test_words_and_pictures_for_a_notebook(tiny):
    found = explain_pair(tiny, patched(1, 1), patched(2, 2), same=False)
    page = found._repr_html_()
    assert page.startswith("<img") and "data:image/png;base64,iVBOR" in page
    assert f"probability {found.probability:.2f}" in page
    says = "the same person" if found.probability >= 0.5 else "different persons"
    right = "wrong" if found.probability >= 0.5 else "right"
    for words in (found.describe(), found.plot().get_suptitle()):
        assert f"says: {says} (" in words and f"— {right}, it is two persons" in words
    for probability, same, right in ((0.9, True, "right"), (0.1, True, "wrong"),
                                     (0.9, False, "wrong"), (0.1, False, "right")):  # fmt: skip
        changed = dataclasses.replace(found, probability=probability, same=same)
        assert f"(90%) — {right}, it is {'one person' if same else 'two persons'}" in (
            changed.headline()
        )
    assert repr(found).startswith("PairExplanation(probability=")
    unknown = explain_pair(tiny, patched(1, 1), patched(2, 2))
    assert "—" not in unknown.describe() and "—" not in unknown.plot().get_suptitle()


def test_a_blank_map_is_shown_as_nothing(detector):
    grey = PIL.Image.new("RGB", SIZE[::-1], (0, 128, 128))
    found = explain_pair(detector, grey, patched(1, 1))
    assert not found.first.attention.any() and found.first.span == (0, 7)
    assert np.isfinite(found.attention_distance) and found._repr_html_()
    assert "Attention on none of 8 in the first picture and rows 2 to 2 of 8" in found.describe()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a CASN"),
        ({"first": 3}, TypeError, "must be a tensor, a PIL image or a path, got int"),
        ({"first": torch.zeros(1, 3, 8, 8)}, ValueError, r"\(3, rows, columns\), got \(1, 3, 8, 8"),
        ({"first": torch.zeros(3, 8, 8, dtype=torch.uint8)}, TypeError, "got torch.uint8"),
        ({"first": torch.zeros(3, 32, 32)}, ValueError, "both images must be of one size"),
        ({"row_threshold": 1.0}, ValueError, r"row_threshold must lie in \[0, 1\), got 1.0"),
        ({"first": "nothing.png"}, FileNotFoundError, "nothing.png"),
    ],
)
def test_bad_input_is_refused(tiny, unchecked, change, error, message):
    options = {"model": tiny, "first": patched(1, 1), "second": patched(1, 1), **change}
    with pytest.raises(error, match=message):
        explain_pair(**options)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_any_mode_are_shown_as_they_look(tiny, mode):
    picture = patched(1, 1).convert(mode)
    found = explain_pair(tiny, picture, patched(1, 1))
    expected = np.asarray(picture.convert("RGB")) / 255
    np.testing.assert_allclose(found.first.picture, expected, atol=1e-6)


def test_attention_of_a_pair_is_not_rounded_by_autocast(tiny):
    encoding = tiny.encode(torch.randn(4, 3, *SIZE))
    expected = pair_attention(tiny, encoding[:2], encoding[2:])
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_attention(tiny, encoding[:2], encoding[2:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
