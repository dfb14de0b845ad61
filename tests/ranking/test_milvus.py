"""Features in Milvus: a real milvus-lite, its filters, and an index that goes on changing."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from indexes import MODEL, encoding, three_shards, tiny

from casn_plugin import Encoding, GalleryIndex
from casn_plugin.ranking import MilvusFeatures, feature_candidates, other_cameras

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

DIM = 6  # of MODEL's features
CAMIDS = [row % 3 for row in range(40)]
PIDS = [row // 4 for row in range(40)]
TIMES = [10.5 * row for row in range(40)]


def images(number: int, seed: int = 0) -> Encoding:
    """Encodings as MODEL's, with features of unlike length."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, DIM, generator=generator)
    features *= 0.1 + torch.rand(number, 1, generator=generator)
    return Encoding(features, basis=torch.rand(number, DIM, 6, 3, generator=generator))


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    """Two shards of 20 images."""
    index = GalleryIndex.create(tmp_path / "index", MODEL)
    every = images(40)
    for part in (slice(0, 20), slice(20, 40)):
        names = [f"{row}/ü.jpg" for row in range(40)][part]
        index.add(every[part], names=names, pids=PIDS[part], camids=CAMIDS[part])
    return index


@pytest.fixture
def milvus(index, tmp_path):
    with MilvusFeatures(index, tmp_path / "db" / "features.db") as features:
        features.update({"time": TIMES})
        yield features


def brute_force(index, query, number, allowed=None):
    """The nearest rows by cosine, one by one."""
    gf = index.features_of(slice(0, len(index)))
    cosines = torch.nn.functional.cosine_similarity(query[:, None], gf[None], dim=2).numpy()
    found = np.full((len(query), number), -1)
    for row, values in enumerate(cosines):
        rows = np.arange(len(gf)) if allowed is None else np.flatnonzero(allowed[row])
        best = rows[np.argsort(-values[rows], kind="stable")][:number]
        found[row, : len(best)] = best
    return found


def test_candidates_are_the_nearest_by_features(index, milvus):
    query = images(7, seed=1).features
    assert len(milvus) == 40
    for number in (1, 9, 40, 50):
        found = milvus.candidates(query, number)
        np.testing.assert_array_equal(found, brute_force(index, query, number))
        if number <= 40:
            gf = index.features_of(slice(0, 40))
            assert np.array_equal(found, feature_candidates(query, gf, number))
    assert milvus.candidates(query[:0], 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("camid != 1", np.array(CAMIDS) != 1),
        ("time >= 100 and time < 200.5", (np.array(TIMES) >= 100) & (np.array(TIMES) < 200.5)),
        ("camid == 2 or pid in [0, 3]", (np.array(CAMIDS) == 2) | np.isin(PIDS, [0, 3])),
        ('name == "7/ü.jpg"', np.arange(40) == 7),
        ("pid > 1000", np.zeros(40, bool)),
    ],
)
def test_a_filter_is_milvus_own_and_changes_the_candidates(index, milvus, expression, allowed):
    query = images(5, seed=2).features
    found = milvus.candidates(query, 6, filter=expression)
    expected = brute_force(index, query, 6, np.tile(allowed, (5, 1)))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, milvus.candidates(query, 6))


def test_each_query_has_a_filter_of_its_own(index, milvus):
    query, camids = images(6, seed=3).features, [0, 1, 2, None, 0, 7]
    found = milvus.candidates(query, 8, filter=other_cameras(camids))
    allowed = np.array([[camid is None or camid != its for its in CAMIDS] for camid in camids])
    np.testing.assert_array_equal(found, brute_force(index, query, 8, allowed))
    by_faiss = feature_candidates(query, index.features_of(slice(0, 40)), 8, allowed=allowed)
    np.testing.assert_array_equal(found, by_faiss)


def test_a_search_among_them_has_attention_of_images_that_pass(index, milvus):
    query = images(2, seed=4)
    rows = milvus.candidates(query.features, 10, filter="camid == 1 and time < 300")
    found = index.search(MODEL, query, topk=4, candidates=rows)
    assert found.camids.tolist() == [[1] * 4] * 2
    assert all(TIMES[row] < 300 for row in found.ranking.indices.flatten())
    assert index.search(MODEL, query, topk=4).camids.tolist() != found.camids.tolist()
    assert found.ranking.scored == (rows >= 0).sum() < 40


def test_what_the_index_no_longer_holds_is_noticed_until_it_is_updated(index, milvus, tmp_path):
    query = images(3, seed=5).features
    milvus.candidates(query, 3)
    index.remove([0, 5, 39])
    with pytest.raises(ValueError, match=r"lacks 0 of the index's 37 images and holds 3 others: "):
        milvus.candidates(query, 3)
    assert milvus.update({"time": [TIMES[int(n.split("/")[0])] for n in index.names]}) == (0, 3)
    np.testing.assert_array_equal(milvus.candidates(query, 40), brute_force(index, query, 40))

    # one image out, another one in: as many as before
    index.remove([index.names.index("7/ü.jpg")])
    index.add(images(1, seed=6), names=["7/ü.jpg"], camids=[9])
    with pytest.raises(ValueError, match=r"lacks 1 of the index's 37 images and holds 1 others"):
        milvus.candidates(query, 3)
    assert milvus.update() == (37, 37)  # times are forgotten, as none were given
    assert milvus.update() == (0, 0)
    np.testing.assert_array_equal(milvus.candidates(query, 40), brute_force(index, query, 40))
    assert milvus.candidates(query, 2, filter="camid == 9").tolist() == [[36, -1]] * 3
    assert milvus.candidates(query, 2, filter="time >= 0").tolist() == [[-1, -1]] * 3


def test_what_another_process_has_changed_is_noticed(index, milvus):
    other = GalleryIndex(index.folder)
    other.remove([3])
    query = images(2, seed=7).features
    assert milvus.candidates(query, 3).shape == (2, 3)  # what it has opened, it still has
    milvus.client.delete(milvus.collection, ids=[*milvus._stored()][:1])
    strange = {"key": "0" * 24 + "-3-1", "features": [1.0] * DIM, "name": "", "pid": 1, "camid": 1}
    milvus.client.upsert(milvus.collection, [strange])
    with pytest.raises(ValueError, match="holds images that the index does not have: call update"):
        milvus.candidates(query, 40)


def test_other_fields_are_known_and_may_be_missing(index, tmp_path):
    gates = ["north" if row % 2 else None for row in range(40)]
    with MilvusFeatures(index, tmp_path / "x.db", collection="g", index_type="FLAT") as milvus:
        fields = {
            "gate": gates,
            "floor": np.arange(40) % 4,
            "night": [row < 8 for row in range(40)],
        }
        assert milvus.update(fields) == (40, 0)
        query = images(1, seed=8).features
        for expression, allowed in (
            ('gate == "north" and floor != 3', [row % 4 == 1 for row in range(40)]),
            ("night == true", [row < 8 for row in range(40)]),
        ):
            found = milvus.candidates(query, 40, filter=expression)
            assert set(found[0].tolist()) - {-1} == set(np.flatnonzero(allowed).tolist())
        fields["floor"] = np.arange(40) % 4 + (np.arange(40) < 3)
        assert milvus.update(fields) == (3, 3)
        milvus.drop()
        assert len(milvus) == 0
        with pytest.raises(ValueError, match="lacks 40 of the index's 40 images"):
            milvus.candidates(query, 1)


def test_it_is_kept_and_bound_to_the_model(index, tmp_path):
    query, path = images(2, seed=9).features, tmp_path / "kept.db"
    with MilvusFeatures(index, path) as milvus:
        milvus.update()
        before = milvus.candidates(query, 5)
    with MilvusFeatures(GalleryIndex(index.folder), str(path)) as milvus:
        assert np.array_equal(milvus.candidates(query, 5), before) and milvus.update() == (0, 0)

        # images by another model have a collection of their own
        other = GalleryIndex.create(tmp_path / "other", tiny(seed=1))
        other.add(images(3), names=["a", "b", "c"])
        with MilvusFeatures(other, path) as stranger:
            with pytest.raises(ValueError, match="lacks 3 of the index's 3 images"):
                stranger.candidates(query, 1)
            stranger.update()
            names = {milvus.collection, stranger.collection}
            assert len(names) == 2 and {*milvus.client.list_collections()} == names
            assert len(stranger) == 3
        assert np.array_equal(milvus.candidates(query, 5), before)


def test_a_file_is_one_process_s_and_errors_are_said_once(index, milvus, tmp_path, capfd):
    program = (
        "import sys; from casn_plugin.ranking import MilvusFeatures, GalleryIndex\n"
        "import torch\n"
        "try:\n"
        "    with MilvusFeatures(GalleryIndex(sys.argv[1]), sys.argv[2]) as milvus:\n"
        f"        print(milvus.candidates(torch.ones(1, {DIM}), 40).shape)\n"
        "except OSError as error: print(error)"
    )
    place = [str(index.folder), str(tmp_path / "db" / "features.db")]
    done = subprocess.run(
        [sys.executable, "-c", program, *place], capture_output=True, text=True, timeout=120
    )
    assert "features.db (one process at a time can)" in done.stdout and not done.stderr, done.stderr
    milvus.close()
    milvus.close()
    done = subprocess.run(
        [sys.executable, "-c", program, *place], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("(1, 40)\n", "")
    milvus = MilvusFeatures(index, place[1])
    query = images(2, seed=1).features
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"can't search with filter 'camid !!! 3': .*'!'"):
        milvus.candidates(query, 3, filter="camid !!! 3")
    assert capfd.readouterr() == ("", "")
    milvus.close()
    assert logging.getLogger("pymilvus").level <= logging.ERROR


def test_bad_input_says_what_was_expected(index, milvus, tmp_path, unchecked):
    query = images(2, seed=1).features
    for arguments, message in (
        ((query[:, :3], 3), rf"query must be of shape \(queries, {DIM}\), got \(2, 3\)"),
        ((query * torch.nan, 3), "query must not be NaN"),
        ((query, 0), "number must be at least 1"),
        ((query, 20000), "number must be at most 16384"),
    ):
        with pytest.raises(ValueError, match=message):
            milvus.candidates(*arguments)
    with pytest.raises(ValueError, match="expected 2 filters, one a query, got 1"):
        milvus.candidates(query, 3, filter=["camid != 1"])
    with pytest.raises(TypeError, match="filter must be a str, got int"):
        milvus.candidates(query, 3, filter=["camid != 1", 7])
    for fields, error, message in (
        ({"time": [1]}, ValueError, "images of the index and time must be of one length"),
        ({"pid": PIDS}, ValueError, "'pid' is the index's own"),
        ({"a b": PIDS}, ValueError, "a field must be letters, digits and '_', got 'a b'"),
        ({"time": [[1]] * 40}, TypeError, "time of '0/ü.jpg' must be a int or float or str"),
        ({"time": [float("nan")] * 40}, ValueError, "time of '0/ü.jpg' must be finite, got nan"),
    ):
        with pytest.raises(error, match=message):
            milvus.update(fields)
    assert milvus.candidates(query, 3).shape == (2, 3)  # nothing was changed
    with pytest.raises(ValueError, match="a path that ends in .db, got 'features'"):
        MilvusFeatures(index, "features")
    with pytest.raises(ValueError, match="collection must be letters, digits and '_', got 'a-b'"):
        MilvusFeatures(index, tmp_path / "a.db", collection="a-b")
    with pytest.raises(ValueError, match=r"the index in .* is empty"):
        MilvusFeatures(GalleryIndex.create(tmp_path / "none", MODEL), tmp_path / "a.db")
    with pytest.raises(TypeError, match="index must be a GalleryIndex, got Encoding"):
        MilvusFeatures(encoding("basis", 3), tmp_path / "a.db")


def test_without_pymilvus_the_hint_is_clear(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'casn-plugin\[milvus\]'"):
        MilvusFeatures(index, tmp_path / "a.db")
    assert not Path(tmp_path / "a.db").exists()


def test_a_shard_that_is_removed_and_added_again_has_its_rows(tmp_path):
    index = three_shards(tmp_path / "index")
    names = [*index.names]
    with MilvusFeatures(index, tmp_path / "a.db") as milvus:
        milvus.update()
        index.remove([0, 1, 2])  # the whole first shard
        index.add(encoding("basis", 4, 0), names=["00a", "01b", "02c", "03d"])
        milvus.update()
        query = index.features_of(slice(0, len(index)))
        assert milvus.candidates(query, 1)[:, 0].tolist() == [*range(len(index))]
        assert index.names != names
