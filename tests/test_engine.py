"""CASN inside the torchreid engine: its run() and all that it takes."""

import copy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchreid
from conftest import MOBILENET, WARD
from engines import SIZE, Backbone, Recorder, make_engine, manager, seed_all
from torch import nn

import casn_plugin.engine
from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    PairSampler,
    SiameseAttentionLoss,
)
from casn_plugin.engine import EMBEDDED_DATASET


def test_three_lines(market_root, tmp_path, capsys):
    datamanager = torchreid.data.ImageDataManager(
        root=str(market_root), sources="market1501", height=64, width=32, batch_size_train=8,
        workers=0, use_gpu=False,
    )  # fmt: skip
    backbone = torchreid.models.build_model(
        "osnet_x0_25", datamanager.num_train_pids, pretrained=False, use_gpu=False
    )
    model = CASN(backbone)
    datamanager = PairSampler.install(datamanager)
    optimizer = torchreid.optim.build_optimizer(model, lr=0.001)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, stepsize=1)
    engine = ImageCASNEngine(datamanager, model, optimizer, scheduler)
    engine.run(max_epoch=2, save_dir=str(tmp_path), print_freq=1, eval_freq=1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("features", "attention", "fused", "mAP", "Rank-1 "))
    assert "AUC" in printed and "loss_ia" in printed
    results = engine.results["market1501"]
    assert set(results) == {"features", "attention", "fused", "auc", "evidence"}
    assert sorted(path.name for path in (tmp_path / "model").glob("model*")) == [
        "model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-2",
    ]  # fmt: skip
    assert [entry["epoch"] for entry in engine.history] == [1, 2]


def test_without_lambdas_it_is_the_softmax_engine_step_for_step(market_root, tmp_path):
    engine = make_engine(market_root, lambda_ia=0.0, lambda_sa=0.0)
    mine = Recorder(engine)
    seed_all(1)
    engine.run(max_epoch=2, save_dir=str(tmp_path / "mine"))

    seed_all()
    datamanager = manager(market_root)
    backbone = Backbone(datamanager.num_train_pids)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    plain = torchreid.engine.ImageSoftmaxEngine(datamanager, backbone, optimizer, scheduler)
    theirs = Recorder(plain)
    seed_all(1)
    plain.run(max_epoch=2, save_dir=str(tmp_path / "theirs"), ranks=[1])
    assert len(mine.steps) == len(theirs.steps) > 4
    assert mine.of("loss") == theirs.of("loss") and mine.of("acc") == theirs.of("acc")
    for one, other in zip(engine.casn.backbone.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    rank1 = plain.test(ranks=[1])
    assert engine.results["market1501"]["features"]["cmc"][0] == pytest.approx(rank1)


def test_run_arguments_do_what_torchreid_documents(market_root, tmp_path, capsys):
    engine = make_engine(market_root, scheduler=False)
    assert engine.run(test_only=True, save_dir=str(tmp_path), visrank=True, visrank_topk=3) is None
    assert len(list((tmp_path / "visrank_market1501").iterdir())) == 12
    with pytest.raises(ValueError, match="visrank"):
        engine.run(visrank=True, max_epoch=1, save_dir=str(tmp_path))
    engine.run(
        save_dir=str(tmp_path), max_epoch=3, start_eval=2, eval_freq=1, use_metric_cuhk03=True,
        ranks=[1, 2, 500],
    )  # fmt: skip
    saved = sorted(path.name[-1] for path in (tmp_path / "model").glob("model.*"))
    assert saved == ["1", "2", "3"]
    printed = capsys.readouterr().out
    assert "Rank-2 " in printed and "Rank-500" not in printed


def test_fixbase_trains_the_open_layers_only(market_root, tmp_path):
    engine = make_engine(market_root)
    before = {name: p.detach().clone() for name, p in engine.casn.named_parameters()}
    engine.run(
        save_dir=str(tmp_path), max_epoch=1, fixbase_epoch=1,
        open_layers=["classifier", "pair_classifier"],
    )  # fmt: skip
    changed = {
        name for name, p in engine.casn.named_parameters() if not torch.equal(p, before[name])
    }
    assert {name.split(".")[-3 if "pair" in name else -2] for name in changed} == {
        "classifier", "pair_classifier",
    }  # fmt: skip


@pytest.mark.parametrize("scheduler", [True, False])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(market_root, tmp_path, scheduler):
    whole = make_engine(market_root, scheduler=scheduler)
    expected = Recorder(whole)
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=4)

    first = make_engine(market_root, scheduler=scheduler)
    first.run(save_dir=str(tmp_path / "part"), max_epoch=2)
    path = tmp_path / "part" / "model" / "model.pth.tar-2"
    checkpoint = torch.load(path, weights_only=True)  # nothing that safe loading rejects
    assert "pair_classifier.0.weight" in checkpoint["state_dict"]

    second = make_engine(market_root, scheduler=scheduler)
    seed_all(99)
    resumed = Recorder(second)
    start = second.resume(str(path))
    assert start == 2
    second.run(save_dir=str(tmp_path / "part"), start_epoch=start, max_epoch=4)
    assert resumed.steps == expected.steps[len(expected.steps) // 2 :]
    assert second.results == whole.results and second.history == whole.history
    for one, other in zip(whole.casn.parameters(), second.casn.parameters(), strict=True):
        assert torch.equal(one, other)


def test_foreign_checkpoints_are_refused(market_root, tmp_path):
    engine = make_engine(market_root)
    with pytest.raises(FileNotFoundError):
        engine.resume(str(tmp_path / "nothing"))
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "foreign")
    with pytest.raises(
        ValueError,
        match=r"foreign is no .*: it lacks \['optimizer', 'random_state'",
    ):
        engine.resume(str(tmp_path / "foreign"))
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    path = tmp_path / "model" / "model.pth.tar-1"
    other = make_engine(market_root)
    other.casn.backbone.classifier = nn.Linear(6, 77)
    before = copy.deepcopy(other._state(0))
    with pytest.raises(ValueError, match="of another model"):
        other.resume(str(path))
    torch.testing.assert_close(other._state(0), before, rtol=0, atol=0)
    checkpoint = torch.load(path, weights_only=True)
    for group in checkpoint["optimizer"]["param_groups"]:
        del group["momentum"]  # as Adam's have none
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"its optimizer lacks \['momentum'\]"):
        make_engine(market_root).resume(str(path))


def test_settings_reach_training(market_root, tmp_path):
    """Weights, scores and orders."""
    engine = make_engine(
        market_root, lambda_ia=0.3, lambda_sa=0.7,
        identification=IdentificationAttentionLoss("logit"),
        siamese=SiameseAttentionLoss(consistency_weight=0.4, both_orders=False),
    )  # fmt: skip
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=2)
    for step in recorder.steps:
        loss_sa = step["loss_bce"] + 0.4 * step["attention_distance"]
        assert step["loss_sa"] == pytest.approx(loss_sa, rel=1e-5)
        expected = step["loss_ide"] + 0.3 * step["loss_ia"] + 0.7 * step["loss_sa"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_pair_classifier_may_have_a_learning_rate_of_its_own(market_root):
    """As a parameter group of the optimizer; weight decay aside it is a factor on the step."""
    steps = []
    for factor in (1.0, 3.0):

        def groups(model, factor=factor):
            own = {"params": model.pair_classifier.parameters(), "lr": 0.01 * factor}
            return torch.optim.SGD([{"params": model.backbone.parameters()}, own], lr=0.01)

        engine = make_engine(market_root, optimize=groups)
        pairs = engine.casn.pair_classifier
        before = pairs[0].weight.detach().clone()
        engine.forward_backward(next(iter(engine.train_loader)))
        steps.append(pairs[0].weight.detach() - before)
    torch.testing.assert_close(steps[1], 3 * steps[0], rtol=1e-3, atol=1e-7)


def test_autocast_on_the_cpu(market_root, tmp_path):
    engine = make_engine(market_root, autocast=torch.bfloat16)
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert np.isfinite(recorder.of("loss")).all()


def test_freed_memory_stays_while_it_trains_on_the_cpu(market_root, tmp_path, monkeypatch):
    said = []

    @contextmanager
    def kept_heap():
        said.append("kept")
        yield
        said.append("given back")

    monkeypatch.setattr(casn_plugin.engine, "kept_heap", kept_heap)
    engine = make_engine(market_root)
    monkeypatch.setattr(engine, "train", lambda *_, **__: said.append("trains"))
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert said == ["kept", "trains", "given back"]


def test_two_targets_and_several_sources(market_root, tmp_path, monkeypatch):
    """Source and target differ; the embedded data set is registered under its name."""
    from casn_plugin.engine import EmbeddedPedestrians

    monkeypatch.setattr(
        EmbeddedPedestrians, "options",
        {"num_train_pids": 4, "num_test_pids": 4, "images_per_camera": 2, "height": 48,
         "width": 24, "progress": False},
    )  # fmt: skip
    monkeypatch.setenv("CASN_PLUGIN_CACHE", str(tmp_path))
    datamanager = torchreid.data.ImageDataManager(
        root="", sources=EMBEDDED_DATASET, height=SIZE[0], width=SIZE[1],
        batch_size_train=8, workers=0, use_gpu=False,
    )  # fmt: skip
    assert datamanager.num_train_pids == 4 and datamanager.num_train_cams == 4
    assert len(datamanager.test_dataset[EMBEDDED_DATASET]["query"]) == 16


def test_bad_input_says_what_was_expected(market_root):
    datamanager = manager(market_root, pairs=False)
    backbone = Backbone(4)
    model = CASN(backbone, input_size=SIZE, hidden_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(TypeError, match="must be a CASN.*got Backbone"):
        ImageCASNEngine(datamanager, backbone, optimizer)
    with pytest.raises(ValueError, match=r"PairSampler\.install\(datamanager\)"):
        ImageCASNEngine(datamanager, model, optimizer)
    ImageCASNEngine(datamanager, model, optimizer, lambda_sa=0.0)  # needs no pairs
    PairSampler.install(datamanager)
    with pytest.raises(ValueError, match="lacks 4 of .*, pair_classifier.0.weight among them"):
        ImageCASNEngine(datamanager, model, torch.optim.SGD(backbone.parameters(), lr=0.1))
    several = PairSampler.install(manager(market_root, pairs=False, k_tfm=2))
    with pytest.raises(ValueError, match="k_tfm must be 1, got 2"):
        ImageCASNEngine(several, model, optimizer)


def test_data_parallel_without_devices_and_its_checkpoint(market_root, tmp_path):
    """nn.DataParallel on the CPU calls the module; checkpoints keep the plain names."""
    engine = make_engine(market_root, wrap=nn.DataParallel)
    if torch.cuda.is_available():
        pytest.skip("runs the CPU path")
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    checkpoint = torch.load(tmp_path / "model" / "model.pth.tar-1", weights_only=True)
    assert "features.0.weight" in checkpoint["state_dict"]
    assert make_engine(market_root).resume(str(tmp_path / "model" / "model.pth.tar-1")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parallel", [False, True])
def test_on_cuda(market_root, tmp_path, autocast, parallel):
    wrap = (lambda model: nn.DataParallel(model.cuda())) if parallel else lambda m: m.cuda()
    engine = make_engine(market_root, wrap=wrap, autocast=autocast)
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert np.isfinite(recorder.of("loss")).all()


@pytest.mark.skipif(not WARD.exists(), reason=f"WARD is not at {WARD}")
@pytest.mark.skipif(not MOBILENET.exists(), reason=f"no weights at {MOBILENET}")
def test_real_pictures_with_pretrained_weights(tmp_path):
    """One epoch on WARD finds its people, with features, attention and both."""
    from torchvision.models import mobilenet_v2

    datamanager = torchreid.data.ImageDataManager(
        root=str(WARD), sources="market1501", height=96, width=48, batch_size_train=32,
        batch_size_test=128, workers=0, use_gpu=False,
    )  # fmt: skip
    gallery = datamanager.test_loader["market1501"]["gallery"].dataset
    gallery.data = gallery.data[::4]
    assert len({pid for _, pid, *_ in gallery.data}) == 35
    seed_all()
    net = mobilenet_v2()
    net.load_state_dict(torch.load(MOBILENET, weights_only=True))
    net.classifier[1] = nn.Linear(1280, datamanager.num_train_pids)

    def forward(net, imgs):
        features = net.features(imgs).mean((2, 3))
        return net.classifier(features), features

    model = CASN(net, forward=forward, input_size=(96, 48))
    groups = [
        {"params": net.parameters()},
        {"params": model.pair_classifier.parameters(), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
    engine = ImageCASNEngine(PairSampler.install(datamanager), model, optimizer, use_gpu=False)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    results = engine.results["market1501"]
    assert results["features"]["mAP"] > 0.15 and results["fused"]["mAP"] > 0.15  # chance is 0.03
    assert results["auc"] > 0.6


def test_both_layouts_of_torchreid(tmp_path):
    """GitHub's torchreid keeps in torchreid/* what PyPI's keeps in torchreid/reid/*."""
    root = Path(torchreid.__file__).parent
    if (root / "reid").is_dir():  # PyPI's is installed: lay it out as GitHub's
        target = tmp_path / "torchreid"
        shutil.copytree(root / "reid", target, ignore=shutil.ignore_patterns("__pycache__"))
        for file in target.rglob("*.py"):
            file.write_text(file.read_text().replace("torchreid.reid", "torchreid"))
        (target / "__init__.py").write_text(
            "from torchreid import data, engine, losses, metrics, models, optim, utils\n"
        )
    else:
        pytest.skip("GitHub's torchreid is installed: the other tests run on its layout")
    script = (
        "import torchreid, casn_plugin; from casn_plugin import ImageCASNEngine;"
        f"assert torchreid.__file__.startswith({str(tmp_path)!r});"
        "assert ImageCASNEngine.__mro__[1].__module__ == 'torchreid.engine.image.softmax'"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
