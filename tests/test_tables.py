"""Rankings and features as tables: pandas, JSON lines and Parquet read what was found."""

import csv
import json
import os
import sys

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import TinyBackbone, tiny_forward

from casn_plugin import (
    CASN,
    Encoding,
    GalleryIndex,
    Similarity,
    feature_table,
    rank_gallery,
    ranking_table,
    rerank_neighbours,
)
from casn_plugin.ranked import ranked_lists
from casn_plugin.tables import FEATURE_COLUMNS, RANKING_COLUMNS, Labels, Table


@pytest.fixture
def model():
    return CASN(TinyBackbone(3), forward=tiny_forward, input_size=(48, 24), hidden_dim=8)


@pytest.fixture
def index(model, tmp_path):
    index = GalleryIndex.create(tmp_path / "index", model)
    encoding = model.encode(torch.rand(6, 3, 48, 24))
    index.add(encoding, names=["a", "b", "ü/c.jpg", "d", "e", "f"], pids=[0, 1, 2, 0, None, 1])
    return index


def read(table, path):
    """The table as its three readers see it: records, a DataFrame, and Parquet's."""
    table.write(path / "table.jsonl")
    table.write(path / "table.parquet")
    lines = (path / "table.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], table.pandas(), path / "table.parquet"


def test_a_search_is_a_row_for_each_match(model, index, tmp_path):
    imgs = torch.rand(2, 3, 48, 24)
    found = index.search(model, imgs, topk=3)
    threshold = float(found.ranking.distances[0, 1])
    table = ranking_table(found, queries=Labels(["q0", "q1"], [7, 8]), threshold=threshold)
    records, frame, parquet = read(table, tmp_path)
    expected = [
        {
            "query": q, "query_name": f"q{q}", "query_pid": 7 + q, "rank": r + 1,
            "gallery": int(found.ranking.indices[q, r]), "name": found.names[q][r],
            "pid": int(found.pids[q, r]), "camid": -1,
            "distance": float(found.ranking.distances[q, r]),
            "feature_distance": float(found.ranking.feature_distances[q, r]),
            "attention_distance": float(found.ranking.attention_distances[q, r]),
            "probability": float(found.scores[q, r].sigmoid()),
            "passes": float(found.ranking.distances[q, r]) <= threshold,
        }
        for q in range(2) for r in range(3)
    ]  # fmt: skip
    assert records == expected and len(table) == 6
    assert [*records[0]] == [name for name in RANKING_COLUMNS if name in records[0]]
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == expected
    assert pyarrow.parquet.read_table(parquet).to_pylist() == expected
    assert [*pandas.read_parquet(parquet).columns] == [*frame.columns] == [*records[0]]
    kinds = {name: frame[name].dtype.kind for name in ("query", "rank", "distance", "passes")}
    assert kinds == {"query": "i", "rank": "i", "distance": "f", "passes": "b"}


def test_a_ranking_has_the_labels_of_its_gallery(model, index):
    query = model.encode(torch.rand(3, 3, 48, 24))
    found = rank_gallery(model, query, index, topk=2)
    labelled, bare = ranking_table(found, gallery=index), ranking_table(found)
    rows = found.indices.flatten().numpy()
    assert labelled.columns["name"].tolist() == [index.names[row] for row in rows]
    assert labelled.columns["pid"].tolist() == index.pids[rows].tolist()
    assert not {"name", "pid", "camid", "passes", "query_name"} & set(bare.columns)
    nothing = ranking_table(rank_gallery(model, query[:0], index))
    assert len(nothing) == 0 and list(nothing.pandas().columns) == list(bare.columns)


def test_what_is_not_there_has_no_row(tmp_path):
    lists = torch.arange(4)[:, None]
    found = rerank_neighbours(lists, torch.zeros(4, 1), 2, topk=2)
    assert len(ranking_table(found)) == 0
    near = torch.cdist(*[torch.rand(9, 2)] * 2).sort(dim=1)
    found = rerank_neighbours(near.indices, near.values, 2, topk=7)
    table = ranking_table(found, threshold=0.5)
    assert table.columns["distance"].tolist() == found.distances[found.indices >= 0].tolist()
    assert table.columns["passes"].tolist() == (table.columns["distance"] <= 0.5).tolist()

    distmat = torch.tensor([[0.2, 0.1, 0.3], [0.3, 0.1, 0.2]])
    ids = np.array([7, 8]), np.array([7, 8, 9]), np.array([1, 2]), np.array([2, 2, 2])
    ranked = ranked_lists(distmat, distmat.flip(1), *ids)  # query 1's entry 1 is junk
    records, frame, _ = read(ranking_table(ranked, gallery=Labels(pids=ids[1])), tmp_path)
    assert records[0] == {"query": 0, "rank": 1, "gallery": 1, "pid": 8, "right": False,
                          "feature_rank": 1}  # fmt: skip
    assert len(records) == 5 and frame["right"].sum() == 1 and frame["gallery"].min() == 0


def test_features_are_vectors(model, index, tmp_path):
    records, frame, parquet = read(feature_table(index), tmp_path)
    features = index.features_of(slice(0, 6)).numpy()
    assert [*records[0]] == list(FEATURE_COLUMNS)
    assert [row["features"] for row in records] == features.tolist()
    assert [row["name"] for row in records] == index.names
    np.testing.assert_array_equal(np.stack(frame["features"]), features)
    np.testing.assert_array_equal(np.stack(pandas.read_parquet(parquet)["features"]), features)
    assert str(pyarrow.parquet.read_schema(parquet).field("features").type).startswith("fixed_size")
    plain = feature_table(index[:2], Labels(names=["x", "y"]))
    assert [*plain.columns] == ["image", "name", "features"]
    assert [*feature_table(index[:2]).columns] == ["image", "features"]


def test_csv_and_json_hold_what_json_lines_hold(model, index, tmp_path):
    found = index.search(model, torch.rand(2, 3, 48, 24), topk=3, candidates=np.array(
        [[2, 0, 1], [4, -1, -1]]
    ))  # fmt: skip
    odd = os.fsdecode(b'\xff,"\n.jpg')  # a file name that is no UTF-8
    table = ranking_table(found, queries=Labels([odd, "q1"]), threshold=1.0)
    records, *_ = read(Table({**table.columns, "query_name": np.array(["q"] * 4)}), tmp_path)
    for record, name in zip(records, [odd] * 3 + ["q1"], strict=True):
        record["query_name"] = name
    for suffix in (".json", ".jsonl", ".csv"):
        table.write(tmp_path / f"table{suffix}")
    assert [json.loads(line) for line in (tmp_path / "table.jsonl").open()] == records
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == records
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [odd.encode("utf-8", "backslashreplace").decode()] * 3 + ["q1"]
    assert [row.pop("query_name") for row in rows] == names
    assert [{name: type(record[name])(row[name]) for name in row} for row, record in zip(
        rows, records, strict=True)] == [
        {name: record[name] for name in record if name != "query_name"} for record in records
    ]  # fmt: skip
    table.write(tmp_path / "table.parquet")
    for frame in (table.pandas(), pandas.read_parquet(tmp_path / "table.parquet")):
        assert frame["query_name"].tolist() == names
    assert [row["rank"] for row in records] == [1, 2, 3, 1] and records[3]["gallery"] == 4
    with pytest.raises(ValueError, match="CSV has no vectors"):
        feature_table(index).write(tmp_path / "features.csv")
    assert not (tmp_path / "features.csv").exists()


def test_of_a_similarity_the_cosine_is_said(tmp_path):
    model = CASN(TinyBackbone(3), forward=tiny_forward, input_size=(48, 24),
                 pair_classifier=Similarity())  # fmt: skip
    index = GalleryIndex.create(tmp_path / "index", model)
    index.add(model.encode(torch.rand(4, 3, 48, 24)))
    query = model.encode(torch.rand(1, 3, 48, 24))
    table = ranking_table(index.search(model, query))
    assert "probability" not in table.columns
    rows = index.features_of(table.columns["gallery"])
    expected = torch.nn.functional.cosine_similarity(query.features, rows).numpy()
    np.testing.assert_allclose(table.columns["similarity"], expected, atol=1e-6)


def test_without_pandas_and_pyarrow_the_hint_is_clear(index, tmp_path, monkeypatch):
    table = feature_table(index)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"this needs pandas: pip install 'casn-plugin\[tables\]"):
        table.pandas()
    with pytest.raises(ImportError, match="this needs pyarrow: pip install"):
        table.write(tmp_path / "table.parquet")
    table.write(tmp_path / "table.jsonl")
    assert not (tmp_path / "table.parquet").exists()


def test_bad_input_says_what_was_expected(model, index, tmp_path, unchecked):
    found = index.search(model, torch.rand(2, 3, 48, 24), topk=3)
    with pytest.raises(TypeError, match="found must be a Ranking, .* got list"):
        ranking_table([found])
    with pytest.raises(ValueError, match="names of queries must be 2, one an image, got 1"):
        ranking_table(found, queries=Labels(names=["q"]))
    with pytest.raises(TypeError, match="names of queries must be a list of text, .* got 'ab'"):
        ranking_table(found, queries=Labels(names="ab"))
    with pytest.raises(ValueError, match=r"pids of gallery must be at least \d, one an image"):
        ranking_table(found.ranking, gallery=Labels(pids=[0]))
    with pytest.raises(TypeError, match="camids of queries must be integers"):
        ranking_table(found, queries=Labels(camids=[0.5, 1.5]))
    with pytest.raises(ValueError, match="threshold must be >= 0 and finite, got -1"):
        ranking_table(found, threshold=-1)
    distmat = torch.rand(1, 2)
    with pytest.raises(ValueError, match="a threshold needs distances"):
        ranking_table(ranked_lists(distmat, distmat, [7], [7, 8]), threshold=1.0)
    with pytest.raises(TypeError, match="images must be an Encoding or an index, got Tensor"):
        feature_table(torch.rand(2, 3))
    broken = Encoding(torch.full((1, 2), torch.nan), basis=torch.rand(1, 2, 3, 3))
    with pytest.raises(ValueError, match="features must be finite"):
        feature_table(broken)
    with pytest.raises(ValueError, match=r"in .jsonl, .json, .csv or .parquet, got '.*table.txt'"):
        feature_table(index).write(tmp_path / "table.txt")
    with pytest.raises(ValueError, match="of one length"):
        Table({"a": np.arange(2), "b": np.arange(3)})
