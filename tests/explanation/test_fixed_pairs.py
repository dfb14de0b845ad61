"""Fixed pairs: the same ones whenever they are looked at, of both kinds."""

import numpy as np
import torch
from planted import SIZE, people, tiny_casn

from casn_plugin import Preprocessing
from casn_plugin.explanation import FixedPairs, pair_mosaic
from casn_plugin.explanation.fixed_pairs import choose_pairs
from casn_plugin.loading import image_loader
from casn_plugin.ranking import pair_attention


def test_pairs_to_log_are_fixed_and_of_both_kinds():
    query = [(f"q{pid}", pid, 0, 0) for pid in (1, 1, 2, 3)]
    gallery = [(f"g{pid}{camid}", pid, camid, 0) for pid in (1, 2, 3) for camid in (0, 1)]
    pairs = choose_pairs(query, gallery, 8)
    assert pairs == choose_pairs(query, gallery, 8) and len(pairs) == 8
    for i, (row, column) in enumerate(pairs):
        assert (query[row][1] == gallery[column][1]) == (i % 2 == 0)
        assert i % 2 or gallery[column][2] != query[row][2]
    assert choose_pairs(query[:1], gallery[:1], 2) == [(0, 0), (0, 0)]  # nothing else is there
    assert choose_pairs(query, gallery, 0) == []


def test_the_mosaic_shows_the_chosen_pairs_as_the_model_is_now():
    model, data = tiny_casn(), people()
    query, gallery = (image_loader("people", each, Preprocessing(SIZE)).dataset
                      for each in (data[::3], data))  # fmt: skip
    pairs = FixedPairs(query, gallery, 3)
    chosen = choose_pairs(query.data, gallery.data, 3)
    assert pairs.same == [True, False, True]
    assert torch.equal(pairs.first, torch.stack([data[::3][i][0] for i, _ in chosen]))
    assert torch.equal(pairs.second, torch.stack([data[j][0] for _, j in chosen]))
    model.preprocessing = Preprocessing(SIZE, (0.1, 0.2, 0.3), (2.0, 2.0, 2.0))
    shown = []
    for _ in range(2):
        encodings = [model.encode(imgs) for imgs in (pairs.first, pairs.second)]
        expected = pair_mosaic(
            *(model.preprocessing.pictures(imgs) for imgs in (pairs.first, pairs.second)),
            *pair_attention(model, *encodings),
            pairs.same,
        )
        shown.append(pairs.mosaic(model))
        np.testing.assert_array_equal(shown[-1], expected)
        model.backbone.features[3].weight.data.neg_()  # it has learned
    assert (shown[0] != shown[1]).any()
