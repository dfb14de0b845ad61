"""What is promised of a long run: nothing lost, nothing poisoned, found before the first step."""

import re
import signal
from pathlib import Path

import pytest
import torch
import torchreid
from engines import SIZE, Backbone, Recorder, make_engine, manager, seed_all
from torch import nn

from casn_plugin import CASN, ImageCASNEngine, PairSampler, RankingOptions
from casn_plugin.checkpoint import Checkpoints, load_checkpoint
from casn_plugin.training import DivergedError, Interrupted


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "model").glob("model*"))


def equal(one, other) -> bool:
    """Bit for bit."""
    pairs = zip(one.casn.state_dict().values(), other.casn.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_every_epoch_is_saved_before_anything_can_fail(market_root, tmp_path, monkeypatch, capsys):
    engine = make_engine(market_root)
    monkeypatch.setattr(engine, "_evaluate", None)  # whatever may go wrong in the final test
    with pytest.raises(TypeError):
        engine.run(save_dir=str(tmp_path), max_epoch=5)
    assert checkpoints_in(tmp_path) == [f"model.pth.tar-{epoch}" for epoch in (3, 4, 5)]
    assert 'The last checkpoint is "' in capsys.readouterr().out
    again = make_engine(market_root)
    assert again.resume(tmp_path) == 5 and equal(again, engine)  # the folder: its newest one
    again.run(save_dir=str(tmp_path), start_epoch=5, max_epoch=5)
    assert checkpoints_in(tmp_path)[0] == "model-best.pth.tar"
    best = load_checkpoint(tmp_path / "model" / "model-best.pth.tar")
    assert best["rank1"] == again.results["market1501"]["fused"]["cmc"][0] == again.best


def test_the_best_checkpoint_is_that_of_the_highest_rank_1(market_root, tmp_path):
    engine = make_engine(market_root, keep_checkpoints=1)
    ranks = iter([0.2, 0.7, 0.5])
    engine.test = lambda *args, **kwargs: next(ranks)
    engine.run(save_dir=str(tmp_path), max_epoch=3, eval_freq=1)
    assert checkpoints_in(tmp_path) == ["model-best.pth.tar", "model.pth.tar-3"]
    best = load_checkpoint(tmp_path / "model" / "model-best.pth.tar")
    assert (best["epoch"], best["rank1"], engine.best) == (2, 0.7, 0.7)
    again = make_engine(market_root)
    again.resume(tmp_path)
    assert again.best == 0.7


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [2, 5, 10])
def test_a_signal_loses_nothing(market_root, tmp_path, capsys, signum, after):
    """In the middle of an epoch, at its last step, and later: going on is bit for bit the same."""
    whole = make_engine(market_root)
    expected = Recorder(whole)
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=3)
    assert len(expected.steps) == 15

    part = make_engine(market_root)
    seen = Recorder(part)
    inner = part.forward_backward

    def forward_backward(data):
        if len(seen.steps) == after - 1:
            signal.raise_signal(signum)
        return inner(data)

    part.forward_backward = forward_backward
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as ended:
        part.run(save_dir=str(tmp_path / "part"), max_epoch=3)
    assert ended.value.code == 128 + signum and signal.getsignal(signum) is before
    assert len(seen.steps) == after
    said = capsys.readouterr().out
    path = Checkpoints(tmp_path / "part" / "model").newest()
    assert re.search(rf'The last checkpoint is "{re.escape(str(path))}": go on with', said)

    rest = make_engine(market_root)
    seed_all(99)
    resumed = Recorder(rest)
    start = rest.resume(tmp_path / "part")
    assert start == after // 5
    rest.run(save_dir=str(tmp_path / "part"), start_epoch=start, max_epoch=3)
    assert seen.steps + resumed.steps == expected.steps
    assert equal(rest, whole) and rest.history == whole.history and rest.results == whole.results
    assert "model-interrupted.pth.tar" not in checkpoints_in(tmp_path / "part")


def test_a_bad_picture_never_reaches_the_weights(market_root, tmp_path, capsys):
    engine, parse = make_engine(market_root), None
    parse = engine.parse_data_for_train

    def with_a_bad_pixel(data):
        if engine.epoch == 1 and engine.batch_idx == 2:
            data["img"][3, 0, 5, 5] = torch.nan
            bad.append(data["impath"][3])
        return parse(data)

    engine.parse_data_for_train, bad = with_a_bad_pixel, []
    engine.run(save_dir=str(tmp_path), max_epoch=2)
    said = capsys.readouterr().out
    assert f"epoch 2, step 3, {bad[0]} holds NaN or infinity: loss is nan" in said
    assert "skipped" not in engine.history[0] and engine.history[1]["skipped"] == 1
    assert all(value.isfinite().all() for value in engine.casn.state_dict().values())
    assert all(value == value for entry in engine.history for value in entry.values())


@pytest.mark.parametrize("lr", [1e3, 1e8, float("inf")])
def test_a_run_that_diverges_ends_with_the_last_good_checkpoint(market_root, tmp_path, capsys, lr):
    engine = make_engine(market_root)
    train = engine.train

    def then_too_fast(*args, **kwargs):
        train(*args, **kwargs)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr if engine.epoch == 1 else group["lr"]

    engine.train = then_too_fast
    try:
        engine.run(save_dir=str(tmp_path), max_epoch=5)
    except DivergedError as error:
        assert "not finite" in str(error) and lr == float("inf")
        assert 'model.pth.tar-2": go on with' in capsys.readouterr().out
    else:
        assert lr < float("inf")  # large and finite is the user's own affair
    state = load_checkpoint(Checkpoints(tmp_path / "model").newest())["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def register(name: str, train, query, gallery, base=torchreid.data.ImageDataset):
    class Data(base):
        def __init__(self, root="", **kwargs):
            super().__init__(train, query, gallery, **kwargs)

    register = torchreid.data.register_image_dataset
    if base is torchreid.data.VideoDataset:
        register = torchreid.data.register_video_dataset
    register(name, Data)
    return name


def engine_of(name: str, classes: int, datamanager=torchreid.data.ImageDataManager, **options):
    options = {"height": SIZE[0], "width": SIZE[1], "workers": 0, "use_gpu": False, **options}
    data = PairSampler.install(datamanager(sources=name, **options))
    model = CASN(Backbone(classes), input_size=SIZE, hidden_dim=16)
    return ImageCASNEngine(data, model, torch.optim.SGD(model.parameters(), 0.01))


@pytest.fixture
def rows(market_root):
    """(path, pid, camid) of pictures of eight people, four of them to train on."""
    datamanager = manager(market_root, pairs=False)
    test = datamanager.test_dataset["market1501"]
    return datamanager.train_loader.dataset.train, test["query"], test["gallery"]


def test_queries_without_a_match_are_found_before_the_first_step(rows, tmp_path):
    train, query, gallery = rows
    here = [row for row in gallery if row[2] == query[0][2]]
    engine = engine_of(register("one_camera", train, query[:1], here), 4, batch_size_train=8)
    for run in (lambda: engine.run(save_dir=str(tmp_path), max_epoch=3), engine.test):
        with pytest.raises(ValueError, match="none of the 1 queries of one_camera has a match"):
            run()
    assert engine.history == [] and not (tmp_path / "model").exists()


@pytest.mark.parametrize("options", [{}, {"lambda_ia": 0.0}, {"lambda_ia": 0.0, "lambda_sa": 0.0}])
def test_fewer_classes_than_identities_are_found_before_the_first_step(
    market_root, tmp_path, options
):
    engine = make_engine(market_root, wrap=nn.DataParallel, **options)
    engine.casn.classifier = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="each of the 4 identities .*, got 3 classes"):
        engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert not list(tmp_path.iterdir())
    engine.run(save_dir=str(tmp_path), test_only=True)  # for which no classifier is needed


def test_a_test_set_of_one_person_is_evaluated(rows, tmp_path, capsys):
    train, query, gallery = rows
    one = [[row for row in part if row[1] == query[0][1]] for part in (query, gallery)]
    engine = engine_of(register("one_person", train, *one), 4, batch_size_train=8)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert engine.best == 1.0 and "AUC -" in capsys.readouterr().out


@pytest.mark.parametrize("part", [0, 1, 2])
def test_damaged_pictures_are_named_at_once(rows, tmp_path, part):
    """torchreid's own reader tries a cut picture for ever."""
    whole = Path(rows[part][0][0])
    for name, content in (("cut.jpg", whole.read_bytes()[:600]), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
    lists = [list(each) for each in rows]
    lists[part][0] = (str(tmp_path / "cut.jpg"), *lists[part][0][1:])
    lists[part][1] = (str(tmp_path / "empty.jpg"), *lists[part][1][1:])
    engine = engine_of(register(f"damaged{part}", *lists), 4, batch_size_train=8)
    message = r"2 of \d+ pictures can't be read: .*cut\.jpg \(.*empty\.jpg \("
    with pytest.raises(ValueError, match=message):
        engine.run(save_dir=str(tmp_path / "log"), max_epoch=1)
    if part:
        with pytest.raises(ValueError, match=message):
            engine.test()


def test_videos_are_refused_at_the_door(rows):
    lists = [[((row[0], row[0]), *row[1:]) for row in part] for part in rows]
    name = register("films", *lists, base=torchreid.data.VideoDataset)
    options = {"batch_size_train": 4, "batch_size_test": 2, "seq_len": 2}
    with pytest.raises(TypeError, match="expected an ImageDataManager, got VideoDataManager"):
        engine_of(name, 4, torchreid.data.VideoDataManager, **options)


def test_two_runs_in_one_folder_are_kept_apart(market_root, tmp_path):
    first, second = make_engine(market_root), make_engine(market_root)
    refused = []
    train = first.train

    def train_while_another_starts(*args, **kwargs):
        with pytest.raises(RuntimeError, match="another run writes its checkpoints to"):
            second.run(save_dir=str(tmp_path), max_epoch=1)
        refused.append(second.history)
        train(*args, **kwargs)

    first.train = train_while_another_starts
    first.run(save_dir=str(tmp_path), max_epoch=1)
    assert refused == [[]]
    second.run(save_dir=str(tmp_path), max_epoch=1)  # once the first has ended


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_ia": -1.0}, ValueError, "lambda_ia must be >= 0 and finite, got -1"),
        ({"lambda_sa": float("nan")}, ValueError, "lambda_sa must be >= 0 and finite, got nan"),
        ({"logged_pairs": -1}, ValueError, "logged_pairs must be >= 0, got -1"),
        ({"keep_checkpoints": -1}, ValueError, "keep_checkpoints must be >= 0, got -1"),
        ({"autocast": "float16"}, TypeError, "autocast must be .* got float16"),
    ],
)
def test_options_are_checked_when_the_engine_is_built(
    market_root, unchecked, options, error, message
):
    with pytest.raises(error, match=message):
        make_engine(market_root, **options)


def test_options_of_run_are_checked_before_the_first_step(market_root, tmp_path, unchecked):
    (tmp_path / "file").touch()
    ranking = RankingOptions(gallery_dir=tmp_path / "file")
    engine = make_engine(market_root, ranking=ranking)
    bad = {"ranks": ([], [0, 1]), "dist_metric": ["l3"], "no_such_option": [1]}
    for name, value in ((name, value) for name, values in bad.items() for value in values):
        for run in (engine.run, engine.test):
            with pytest.raises((TypeError, ValueError), match=name):
                run(save_dir=str(tmp_path / "log"), **{name: value})
    with pytest.raises(OSError, match="gallery_dir must be a folder that can be written: .*file'"):
        engine.run(save_dir=str(tmp_path / "log"), max_epoch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and not engine.history
    with pytest.raises(TypeError, match="gallery_dir must be a str or PathLike, got int"):
        RankingOptions(gallery_dir=5)


def test_pictures_may_be_named_by_paths(rows, tmp_path):
    parts = [[(Path(row[0]), *row[1:]) for row in part] for part in rows]
    engine = engine_of(register("paths", *parts), 4, batch_size_train=8)
    engine.run(save_dir=tmp_path / "log", max_epoch=1)
    engine.run(save_dir=tmp_path / "log", test_only=True, visrank=True, visrank_topk=1)
    assert (tmp_path / "log" / "visrank_paths").is_dir()


def test_without_kept_checkpoints_only_torchreids_own_is_written(market_root, tmp_path):
    make_engine(market_root, keep_checkpoints=0).run(save_dir=str(tmp_path), max_epoch=2)
    assert checkpoints_in(tmp_path) == ["model-best.pth.tar", "model.pth.tar-2"]
