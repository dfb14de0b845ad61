"""Explanations say what the model computes, show it where it is, and leave the model as found."""

import copy
import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest
import reference
import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import CASN, explain_pair, explain_ranking, rank_gallery
from casn_plugin.explanation import ExplainedRankings, _Labelled
from casn_plugin.ranking import pair_attention
from casn_plugin.visualization import IMAGENET_MEAN, IMAGENET_STD

SIZE = (64, 32)


class Detector(nn.Module):
    """A backbone whose first map is where red is, and whose second one where it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 8, 8, bias=False)
        colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]])
        self.features.weight.data = colours[:, :, None, None].expand(2, 3, 8, 8) / 64
        self.classifier = nn.Linear(2, 3)


def detect(backbone: Detector, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = backbone.features(imgs).relu().mean((2, 3))
    return backbone.classifier(features), features


@pytest.fixture
def detector():
    """A CASN that says "same" of whatever is redder in the first image."""
    pair_classifier = nn.Linear(2, 2)
    pair_classifier.weight.data = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    model = CASN(Detector(), forward=detect, pair_classifier=pair_classifier, input_size=SIZE)
    return model.eval()


@pytest.fixture
def tiny():
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=SIZE, hidden_dim=16)


def patched(row: int, column: int) -> PIL.Image.Image:
    """A grey picture with a red patch in one cell of the 8 x 4 map."""
    picture = np.full((*SIZE, 3), 128, np.uint8)
    picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (255, 0, 0)
    return PIL.Image.fromarray(picture)


@pytest.mark.parametrize(("first", "second"), [((1, 0), (6, 3)), ((4, 2), (4, 1))])
def test_attention_lands_on_the_planted_patch(detector, first, second):
    found = explain_pair(detector, patched(*first), patched(*second))
    for place, attention, profile, span, picture in (
        (first, found.first_attention, found.first_profile, found.first_span, found.first_picture),
        (second, found.second_attention, found.second_profile, found.second_span,
         found.second_picture),
    ):  # fmt: skip
        assert divmod(int(attention.argmax()), 4) == place and attention.max() == 1
        assert int(profile.argmax()) == place[0] and span == (place[0], place[0])
        row, column = 8 * place[0] + 4, 8 * place[1] + 4
        np.testing.assert_allclose(picture[row, column], [1, 0, 0], atol=1e-6)
    # aligned, two patches are alike wherever they are
    assert found.attention_distance < 1e-6
    assert torch.allclose(found.first_aligned, torch.ones(8))

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
    found = explain_pair(tiny, imgs[0], imgs[1], threshold=0.4)
    backbone = tiny.backbone
    activations = backbone.features(imgs).detach()
    maps = reference.siamese_maps(
        lambda a: backbone.embed(backbone.relu(a.clone()).mean((2, 3))),
        tiny.pair_classifier, *activations,
    )  # fmt: skip
    one, two = (each.detach().numpy() for each in maps)
    np.testing.assert_allclose(found.first_attention, reference.scale_map(one), atol=1e-12)
    np.testing.assert_allclose(found.second_attention, reference.scale_map(two), atol=1e-12)
    expected = reference.attention_distance(one, two, threshold=0.4)
    assert found.attention_distance == pytest.approx(expected, abs=1e-10)
    aligned = found.first_aligned - found.second_aligned
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
        np.testing.assert_allclose(other.first_picture, np.asarray(pictures[0]) / 255, atol=1e-6)
    # resized to the model's size, or to the size that is asked for
    large = pictures[0].resize((50, 90))
    assert explain_pair(tiny, large, pictures[1]).first_picture.shape == (*SIZE, 3)
    assert explain_pair(tiny, large, large, size=(48, 24)).first_picture.shape == (48, 24, 3)


def test_a_photo_is_turned_upright(tiny, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    patched(0, 0).save(tmp_path / "turned.png", exif=exif)
    found = explain_pair(tiny, tmp_path / "turned.png", patched(7, 3))
    np.testing.assert_array_equal(found.first_picture, found.second_picture)


def test_any_mean_and_std_is_undone(tiny):
    pair = patched(2, 1), PIL.Image.new("RGB", SIZE[::-1], (0, 255, 0))
    found = explain_pair(tiny, *pair, mean=(0.1, 0.5, 0.9), std=(1.0, 0.5, 0.25))
    np.testing.assert_allclose(found.first_picture, np.asarray(pair[0]) / 255, atol=1e-6)
    assert found.probability != explain_pair(tiny, *pair).probability
    options = {"mean": (0.1, 0.5, 0.9), "std": (1.0, 0.5, 0.25)}
    ranked = explain_ranking(tiny, [(pair[0], 1, 0)], [(pair[1], 1, 1)], **options)[0]
    np.testing.assert_allclose(ranked.picture, np.asarray(pair[0]) / 255, atol=1e-6)


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
    assert not found.first_attention.any() and found.first_span == (0, 7)
    assert np.isfinite(found.attention_distance) and found._repr_html_()
    assert "Attention on none of 8 in the first picture and rows 2 to 2 of 8" in found.describe()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a CASN"),
        ({"first": 3}, TypeError, "must be a tensor, a PIL image or a path, got int"),
        ({"first": torch.zeros(1, 3, 8, 8)}, ValueError, r"\(3, rows, columns\), got \(1, 3, 8, 8"),
        ({"first": torch.zeros(3, 8, 8, dtype=torch.uint8)}, ValueError, "of torch.uint8"),
        ({"first": torch.zeros(3, 32, 32)}, ValueError, "both images must be of one size"),
        ({"threshold": 1.0}, ValueError, r"threshold must lie in \[0, 1\), got 1.0"),
        ({"std": (1, 0, 1)}, ValueError, "std positive"),
        ({"mean": (1, 0)}, ValueError, "three numbers"),
        ({"first": "nothing.png"}, FileNotFoundError, "nothing.png"),
    ],
)
def test_bad_input_is_refused(tiny, unchecked, change, error, message):
    options = {"model": tiny, "first": patched(1, 1), "second": patched(1, 1), **change}
    with pytest.raises(error, match=message):
        explain_pair(**options)


def people(number: int = 3, cameras: int = 3) -> list[tuple[torch.Tensor, int, int]]:
    """Images of some people by some cameras, a sequence of (image, pid, camid)."""
    generator = torch.Generator().manual_seed(3)
    looks = torch.randn(number, 3, *SIZE, generator=generator)
    return [
        (looks[pid] + 1.5 * torch.randn(3, *SIZE, generator=generator), 10 + pid, camid)
        for pid in range(number)
        for camid in range(cameras)
    ]


@pytest.mark.parametrize("topk", [1, 4])
def test_ranked_lists_are_those_of_rank_gallery(tiny, topk):
    query, gallery = people()[::3], people()
    explained = explain_ranking(
        tiny, query, gallery, topk=topk, attention_weight=0.5, threshold=0.3
    )
    assert len(explained) == 3 and len(explained[:2]) == 2
    encode = [tiny.encode(torch.stack([img for img, *_ in data])) for data in (query, gallery)]
    ranking = rank_gallery(tiny, *encode, topk=len(gallery), attention_weight=0.5, threshold=0.3)
    by_features = (
        nn.functional.normalize(encode[0].features)[:, None]
        - nn.functional.normalize(encode[1].features)
    ).norm(dim=2)
    for i, found in enumerate(explained):
        _, pid, camid = query[i]
        assert (found.query, found.pid, found.camid) == (i, pid, camid)
        junk = [g for g, (_, p, c) in enumerate(gallery) if (p, c) == (pid, camid)]
        order = [g for g in ranking.indices[i].tolist() if g not in junk]
        assert [match.row for match in found.matches] == order[:topk]
        kept = [g for g in by_features[i].argsort().tolist() if g not in junk]
        for match in (*found.matches, *filter(None, [found.truth])):
            assert match.rank == 1 + order.index(match.row)
            assert match.feature_rank == 1 + kept.index(match.row)
            assert match.right == (gallery[match.row][1] == pid) == bool(match.pair.same)
            assert (match.pid, match.camid) == gallery[match.row][1:]
            alone = explain_pair(tiny, query[i][0], gallery[match.row][0], threshold=0.3)
            assert match.pair.probability == pytest.approx(alone.probability, abs=1e-6)
            assert match.pair.threshold == 0.3
            torch.testing.assert_close(match.pair.first_attention, alone.first_attention)
            torch.testing.assert_close(match.pair.second_attention, alone.second_attention)
        assert (found.truth is None) == any(match.right for match in found.matches)


def test_a_failure_shows_where_the_truth_stands(detector):
    """The query is red: by features, other red people come before its own green picture."""
    red, green = patched(1, 1), PIL.Image.new("RGB", SIZE[::-1], (0, 255, 0))
    gallery = [(red, 2, 1), (red, 3, 1), (red, 2, 2), (green, 1, 1), (red, 1, 0)]
    explained = explain_ranking(detector, [(red, 1, 0), (red, 2, 0)], gallery, topk=2)
    (failure,) = explained.failures()
    assert failure.query == 0 and failure.failed and not explained[1].failed
    assert [match.right for match in failure.matches] == [False, False]
    moved = dataclasses.replace(explained.ranked, truth_feature_rank=np.array([9, 9]))
    elsewhere = ExplainedRankings(detector, *explained._data, moved, topk=2)[0].truth
    assert (elsewhere.rank, elsewhere.feature_rank) == (4, 9)
    success = explained[1]
    assert failure.found is failure.truth and success.found is success.matches[0]
    assert failure.truth.row == 3 and failure.truth.rank == 4 and failure.truth.right
    assert "wrong at rank 1, found at rank 4" in failure.headline()
    assert "rank 4 (by features 4): same person" in failure.describe()
    assert [each.query for each in explained.worst()] == [0, 1]
    assert [each.query for each in explained.best(1)] == [1]
    assert [each.query for each in explained.worst(1)] == [0] and not list(explained.failures(0))

    figure = failure.plot()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "query"
    assert [title for title in titles if "person" in title] == [
        "✗ other person", "✗ other person", "✓ same person",
    ]  # fmt: skip
    framed = {
        axis.get_title(): axis.spines["top"].get_edgecolor()
        for axis in figure.axes
        if "person" in axis.get_title()
    }
    right, wrong = framed["✓ same person"], framed["✗ other person"]
    assert right[1] > 2 * right[0] and wrong[0] > 2 * wrong[1]  # green and red
    assert any("(features: 4)" in axis.get_xlabel() for axis in figure.axes)
    figure.canvas.draw()
    places = [axis.get_position() for axis in figure.axes if "person" in axis.get_title()]
    gaps = [after.x0 - before.x1 for before, after in itertools.pairwise(places)]
    assert gaps[1] > 2 * gaps[0]  # the truth stands apart
    assert failure._repr_html_().startswith("<img") and "truth" not in repr(failure)


def test_a_query_without_a_match_is_said_to_have_none(detector):
    red = patched(1, 1)
    explained = explain_ranking(detector, [(red, 1, 0), (red, 9, 0)], [(red, 1, 1), (red, 1, 0)])
    alone = explained[1]
    assert alone.truth is None and np.isnan(alone.ap) and "nobody to be found" in alone.headline()
    assert len(alone.matches) == 2 and len(explained[0].matches) == 1  # junk is left out
    assert [each.query for each in explained.worst()] == [0] and not list(explained.failures())
    assert alone.plot() and explained[0].plot()


def test_loaders_paths_and_tensors_are_ranked_alike(tiny, tmp_path):
    data = []
    for i, (row, pid) in enumerate(((0, 1), (3, 1), (5, 2), (7, 2))):
        patched(row, i).save(tmp_path / f"{i}.png")
        data.append((str(tmp_path / f"{i}.png"), pid, i % 2, 0))  # as torchreid's lists are
    loader = DataLoader(_Labelled(data, SIZE, IMAGENET_MEAN, IMAGENET_STD), batch_size=3)
    by_path = explain_ranking(tiny, data, data)
    by_loader = explain_ranking(tiny, loader, loader)
    np.testing.assert_array_equal(by_path.ranked.nearest, by_loader.ranked.nearest)
    shortlist = explain_ranking(tiny, data, data, shortlist=4)
    np.testing.assert_array_equal(by_path.ranked.nearest, shortlist.ranked.nearest)
    # a loader that shuffles or drops: rows are those of its data set all the same
    generator = torch.Generator().manual_seed(1)
    other = DataLoader(
        loader.dataset, batch_size=3, shuffle=True, drop_last=True, generator=generator
    )
    by_other = explain_ranking(tiny, other, other)
    np.testing.assert_array_equal(by_path.ranked.nearest, by_other.ranked.nearest)
    with pytest.raises(ValueError, match="three numbers"):
        explain_ranking(tiny, loader, loader, mean=(1.0, 0.0))


def test_a_query_with_nothing_but_junk_is_shown_alone(tiny):
    (img, *_), *_ = people()
    alone = explain_ranking(tiny, [(img, 1, 0), (img, 1, 1)], [(img, 1, 0)])[0]
    assert not alone.matches and not alone.failed and alone.truth is None
    assert alone.describe().endswith("nobody to be found. Nothing to compare with.")
    assert "Nothing to compare with" in alone._repr_html_()


def test_models_and_images_of_any_dtype_and_mode(tiny):
    query, gallery = people()[::3], people()
    expected = explain_ranking(tiny, query, gallery)
    wide = [(img.double(), pid, camid) for img, pid, camid in gallery]
    halved = [(img.half(), pid, camid) for img, pid, camid in gallery]
    assert explain_ranking(tiny, query, halved)[0].matches
    custom = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    own = CASN(TinyBackbone(), forward=tiny_forward, pair_classifier=custom, input_size=SIZE)
    for model in (tiny, own):
        with torch.inference_mode():
            found = explain_ranking(model, query, gallery)
            assert found[0].plot() and explain_pair(model, query[0][0], gallery[1][0]).plot()
    double = copy.deepcopy(tiny).double()
    for images in (gallery, wide):
        again = explain_ranking(double, query, images)
        np.testing.assert_array_equal(again.ranked.nearest, expected.ranked.nearest)
    for call in (
        lambda model: explain_ranking(model, query, gallery),
        lambda model: explain_pair(model, query[0][0], query[1][0]),
    ):
        with pytest.raises(TypeError, match="needs float32 or wider"):
            call(copy.deepcopy(tiny).bfloat16())
    with pytest.raises(ValueError, match="must be finite"):
        explain_pair(tiny, query[0][0] * torch.nan, query[1][0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_any_mode_are_shown_as_they_look(tiny, mode):
    picture = patched(1, 1).convert(mode)
    found = explain_pair(tiny, picture, patched(1, 1))
    expected = np.asarray(picture.convert("RGB")) / 255
    np.testing.assert_allclose(found.first_picture, expected, atol=1e-6)


def test_attention_of_a_pair_is_not_rounded_by_autocast(tiny):
    encoding = tiny.encode(torch.randn(4, 3, *SIZE))
    expected = pair_attention(tiny, encoding[:2], encoding[2:])
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_attention(tiny, encoding[:2], encoding[2:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_long_lists_and_shortlists(tiny):
    query, gallery = people(4)[::3], people(4)
    assert len(explain_ranking(tiny, query, gallery, topk=11)[0].matches) == 11
    others = [row for row in gallery if row[2]]  # no junk
    options = {"topk": 8, "attention_weight": 5.0}
    fused = explain_ranking(tiny, query, others, **options).ranked.feature_ranks
    listed = explain_ranking(tiny, query, others, **options, shortlist=1).ranked.feature_ranks
    assert (listed == np.arange(1, 9)).all() and (fused != np.arange(1, 9)).any()


@pytest.mark.parametrize(
    ("query", "gallery", "error", "message"),
    [
        ([], people(), ValueError, "query is empty"),
        (people(), [], ValueError, "gallery is empty"),
        ("query", people(), TypeError, "query must be a DataLoader or a sequence of"),
        (["a.png"], people(), TypeError, r"query must hold \(image, pid, camid\), got 'a.png'"),
        ([(torch.zeros(3, 8, 8), 1, 0), *people()], people(), ValueError, "must be of one size"),
        ([(people()[0][0], 99, 0)], people(), ValueError, "none of the 1 queries has a match"),
    ],
)
def test_bad_data_is_refused(tiny, query, gallery, error, message):
    with pytest.raises(error, match=message):
        explain_ranking(tiny, query, gallery)


def test_bad_lists_are_refused(tiny):
    explained = explain_ranking(tiny, people(), people())
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        explain_ranking(tiny, people(), people(), topk=0)
    with pytest.raises(ValueError, match="ranked lists of 9 queries for 3 queries"):
        ExplainedRankings(tiny, people()[:3], people(), explained.ranked)
    with pytest.raises(ValueError, match="a gallery longer than 3 images"):
        ExplainedRankings(tiny, people(), people()[:3], explained.ranked)
    with pytest.raises(ValueError, match="attention_weight must be >= 0 and finite, got -1.0"):
        explain_ranking(tiny, people(), people(), attention_weight=-1.0)
    with pytest.raises(IndexError):
        explained[9]
