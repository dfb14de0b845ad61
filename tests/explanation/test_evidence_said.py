"""Every figure, page and result says what attention is evidence of."""

import json

import pytest
import torch
from planted import SIZE, TinyBackbone, people, tiny_casn, tiny_forward
from torch import nn

from casn_plugin import CASN, Preprocessing, Similarity, explain_pair, explain_ranking
from casn_plugin.explanation import AttentionBoard, html_report, plot_pair, plot_ranking
from casn_plugin.loading import encode_loader, image_loader
from casn_plugin.retrieval import LabelledEncodings, retrieve, side_by_side

SIMILAR = "similarity of both features (no pair classifier was trained)"
UNTRAINED = "pair classifier with its initial weights (never trained)"
TRAINED = "trained pair classifier"


def model_of(evidence: str) -> CASN:
    if evidence == SIMILAR:
        model = CASN(
            TinyBackbone(), forward=tiny_forward, input_size=SIZE, pair_classifier=Similarity()
        )
        return model.eval()
    model = tiny_casn().eval()
    if evidence == TRAINED:
        nn.init.normal_(model.pair_classifier[2].weight)
    return model


def words_of(figure) -> str:
    found = [*figure.texts, *(t for axis in figure.axes for t in [axis.title, axis.xaxis.label])]
    return "\n".join(text.get_text() for text in found).replace("\n", " ")


@pytest.fixture(params=[SIMILAR, UNTRAINED, TRAINED])
def evidence(request) -> str:
    return request.param


def test_a_pair_says_it(evidence):
    found = explain_pair(model_of(evidence), *torch.rand(2, 3, *SIZE), same=True)
    assert found.evidence == evidence and f"evidence={found.evidence.name}" in repr(found)
    for words in (words_of(found.plot()), found.describe(), found._repr_html_()):
        assert f"Evidence: {evidence}" in words
    drawn = words_of(found.plot())
    if evidence == SIMILAR:
        assert found.headline() == (
            f"The features are alike by {found.similarity:.2f} of at most 1 — it is one person"
        )
        assert found.probability is None and "probability" not in found.describe()
        assert "what makes the features of both alike" in drawn and "same person" not in drawn
    else:
        assert found.headline().startswith("The model says: ")
        assert "what speaks for the same person" in drawn


def test_the_similarity_is_the_cosine_of_both_features():
    model, imgs = model_of(SIMILAR), torch.rand(2, 3, *SIZE)
    first, second = model.encode(imgs).features
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0).item()
    assert explain_pair(model, *imgs).similarity == pytest.approx(cosine, abs=1e-6)


def test_a_ranked_list_and_its_page_say_it(evidence):
    data, model = people(), model_of(evidence)
    explained = explain_ranking(model, data[:3], data, topk=2)
    assert explained.evidence == explained[0].evidence == evidence
    assert f"Evidence: {evidence}" in explained[0].describe()
    drawn = words_of(explained[0].plot())
    assert f"Evidence: {evidence}" in drawn
    assert ("similarity: " in drawn) == ("same: " not in drawn) == (evidence == SIMILAR)
    parts = []
    for images in (data[:3], data):
        loader = image_loader("images", images, Preprocessing(SIZE))
        parts.append(LabelledEncodings(*encode_loader(model, loader)))
    results = retrieve(model, *parts).results
    assert json.loads(json.dumps(results))["evidence"] == evidence
    assert f"Evidence: {evidence}, AUC " in side_by_side(results)
    page = html_report(explained, results, number=1)
    assert f"<p>Evidence: {evidence}.</p>" in page and page.count(f"Evidence: {evidence}") >= 4
    assert ("Cosine similarity" in page) == ("Same person" not in page) == (evidence == SIMILAR)
    assert ("Similarity: ROC AUC" in page) == (evidence == SIMILAR)


def test_figures_of_ones_own_say_nothing_that_they_were_not_told():
    found = explain_pair(model_of(SIMILAR), *torch.rand(2, 3, *SIZE))
    assert "Evidence" not in words_of(plot_pair(found.first, found.second))
    one = [(found.first, found.second)]
    assert "Evidence" not in words_of(plot_ranking(found.first.picture, one, [True], ["1"]))


class Writer:
    def add_image(self, tag, *args, **kwargs) -> None:
        self.tag = tag


class Data:
    def __init__(self, data) -> None:
        self.data = data

    def __getitem__(self, row):
        return dict(zip(("img", "pid", "camid"), self.data[row], strict=True))


@pytest.mark.parametrize(("evidence", "tag"), [(SIMILAR, "Attention of similarity/some"),
                                               (TRAINED, "Attention/some")])  # fmt: skip
def test_tensorboard_keeps_them_apart(evidence, tag):
    data, writer = Data(people()), Writer()
    board = AttentionBoard("some", data, data, 2)
    board.log(writer, model_of(evidence), 0)
    assert writer.tag == tag
