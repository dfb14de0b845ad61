"""The options of the laboratory: what they make of data, model and engine."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchreid
from conftest import MOBILENET, WARD

from casn_plugin import ImageCASNEngine
from casn_plugin.identities import UNKNOWN

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def protocols(lab) -> ModuleType:
    """The module of the options."""
    return lab("protocols")


def market(root: Path, *options: object) -> list[str]:
    common = [
        *("--height", 64, "--width", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu"),
        *("--root", root, "--sources", "market1501", *options),
    ]
    return [str(option) for option in common]


def build(protocols: ModuleType, root: Path, *options: object) -> ImageCASNEngine:
    return protocols.build_engine(protocols.parse_args(market(root, *options)))


def test_every_option_of_a_preset_can_be_overridden(protocols, tmp_path):
    (tmp_path / "cuhk03").mkdir()
    preset = ["--preset", "cuhk03-labeled-ide", "--root", str(tmp_path)]
    assert protocols.parse_args(preset).cuhk03_labeled
    args = protocols.parse_args(
        [*preset, "--no-cuhk03-labeled", "--label-smooth", "--lr", "0.1", "--max-epoch", "60",
         "--base-lr-mult", "0.1", "--backbone", "osnet_x1_0", "--lambda-sa", "0"]
    )  # fmt: skip
    assert (args.cuhk03_labeled, args.label_smooth, args.lr, args.max_epoch) == (
        False, True, 0.1, 60,
    )  # fmt: skip
    assert (args.base_lr_mult, args.backbone, args.lambda_sa) == (0.1, "osnet_x1_0", 0)
    assert (args.height, args.width, args.batch_size) == (288, 144, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "7"], "--batch-size must be even, got 7"),
        (["--identities", "1"], "--identities must be at least 2, got 1"),
        (["--topk", "0"], "--topk must be at least 1, got 0"),
        (["--topk", "5", "--map-scale", "range"], "--map-scale range compares all pairs"),
        (["--sources", "viper", "--root", "x"], "viper is expected in x"),
        (["--targets", "dukemtmcreid", "--root", "x"], "dukemtmcreid is expected in x"),
        (["--sources", "other"], "torchreid knows no data set 'other', but market1501"),
        (["--backbone", "mobilenet_v2", "--weights", "imagenet"], "takes a FILE, or none"),
    ],
)
def test_bad_options_are_refused_at_once(protocols, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        protocols.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_options_reach_the_engine(protocols, market_root):
    options = {
        "--score": "logit", "--mask-scale": 5.0, "--mask-threshold": 0.7, "--ia-start-epoch": 3,
        "--row-threshold": 0.4, "--consistency-weight": 2.0, "--hidden-dim": 7,
        "--attention-weight": 0.3, "--topk": 4,
    }  # fmt: skip
    given = [word for option in options.items() for word in option]
    more = ("--one-order", "--any-camera", "--unit-profiles")
    engine = build(protocols, market_root, *given, *more)
    ia, siamese = engine.identification, engine.siamese
    found = (
        ia.score, ia.mask_scale, ia.mask_threshold, engine.ia_start_epoch, siamese.row_threshold,
        siamese.consistency_weight, engine.casn.pair_classifier[0].out_features,
        engine.ranking.attention_weight, engine.ranking.shortlist,
    )  # fmt: skip
    assert found == tuple(options.values())
    assert siamese.unit and not siamese.both_orders
    assert set(engine.train_loader.sampler.camids) == {UNKNOWN}
    default = build(protocols, market_root)
    assert default.siamese.both_orders and not default.siamese.unit
    assert set(default.train_loader.sampler.camids) == {0, 1, 2}
    assert len(engine.train_loader) == len(default.train_loader)


def test_learning_rates_of_layers_and_of_the_pair_classifier(protocols, market_root):
    def step(*options: object) -> dict[str, torch.Tensor]:
        engine = build(protocols, market_root, "--optim", "sgd", "--lr", 0.01, *options)
        before = {name: value.clone() for name, value in engine.casn.state_dict().items()}
        engine.epoch = 0
        engine.set_model_mode("train")
        engine.forward_backward(next(iter(engine.train_loader)))
        after = engine.casn.state_dict()
        return {name: after[name] - value for name, value in before.items()}

    plain, faster = step(), step("--pair-lr-mult", 20, "--base-lr-mult", 0.5)
    pair, body, head = "pair_classifier.0.weight", "layer1.0.conv1.weight", "classifier.0.weight"
    torch.testing.assert_close(faster[body], 0.5 * plain[body], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(faster[head], plain[head], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(faster[pair], 20 * plain[pair], rtol=0.02, atol=5e-6)


def test_l_ia_counts_after_its_warm_up(protocols, market_root):
    engine = build(protocols, market_root, "--ia-start-epoch", 1)
    engine.run(max_epoch=2, save_dir="log")
    assert ["loss_ia" in epoch for epoch in engine.history] == [False, True]
    assert engine.lambda_ia == 0.5


def test_the_first_identities_alone_are_trained_on(protocols, market_root):
    engine = build(protocols, market_root, "--identities", 3)
    images = engine.train_loader.dataset
    assert len(images) == 27 and {row[1] for row in images.data} == {0, 1, 2}
    assert engine.casn.classifier[0].out_features == engine.datamanager.num_train_pids == 3
    assert len(engine.train_loader.sampler.pids) == 27
    engine.run(max_epoch=1, save_dir="log")
    assert len(engine.test_loader["market1501"]["gallery"].dataset) == 24  # ranking is as ever
    with pytest.raises(SystemExit, match="market1501 has 4 to train on, got 5"):
        build(protocols, market_root, "--identities", 5)


def test_the_forms_of_the_pair_classifier(protocols, lab, market_root):
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 1024)
    even, curved, states = {}, {}, []
    for form in ("signed", "absolute", "affine"):
        options = protocols.parse_args(market(market_root, "--pair-classifier", form))
        torch.manual_seed(7)
        classifier = lab("backbones").build_model(options, 3).pair_classifier.eval()
        states.append(torch.get_rng_state())
        assert (form == "affine") == isinstance(classifier, torch.nn.Linear)
        forth, back = classifier(first - second), classifier(second - first)
        even[form] = torch.allclose(forth, back)
        curved[form] = not torch.allclose(forth + back, 2 * classifier(first * 0), atol=1e-5)
    assert even == {"signed": False, "absolute": True, "affine": False}
    assert curved == {"signed": True, "absolute": True, "affine": False}
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_a_checkpoint_is_ranked_otherwise(protocols, market_root):
    trained = protocols.main(market(market_root, "--max-epoch", 1, "--save-dir", "log"))
    checkpoint = ("--test-only", "--resume", "log/model/model.pth.tar-1", "--save-dir")
    again = protocols.main(market(market_root, *checkpoint, "test", "--visrank"))
    assert again == trained and Path("test", "visrank_market1501").is_dir()
    reranked = protocols.main(market(market_root, *checkpoint, "rerank", "--rerank"))
    assert reranked != trained
    # a shortlist as long as the gallery is no shortlist
    few, all_pairs = (
        protocols.main(market(market_root, *checkpoint, "topk", "--topk", topk))["market1501"]
        for topk in (3, 24)
    )
    assert all_pairs == trained["market1501"] != few
    with pytest.raises(SystemExit, match=r"--map-scale range is for ablation.py"):
        protocols.main(market(market_root, "--map-scale", "range"))


def test_settings_are_all_that_a_result_depends_on(protocols, market_root):
    weights = Path("folder", "weights.pth")
    weights.parent.mkdir()
    torch.save({}, weights)
    args = protocols.parse_args(market(market_root, "--weights", weights, "--save-dir", "log"))
    settings = protocols.settings_of(args)
    assert settings["weights"] == "weights.pth" and settings["row_threshold"] == 0.2
    assert {"topk", "identities", "map_scale", "seed", "preset"} <= set(settings)
    assert not {"root", "device", "workers", "save_dir", "gallery_dir"} & set(settings)


@pytest.mark.skipif(not WARD.exists(), reason=f"WARD is not at {WARD}")
@pytest.mark.skipif(not MOBILENET.exists(), reason=f"no weights at {MOBILENET}")
def test_real_pictures_with_a_plain_module(protocols):
    """WARD with ImageNet's MobileNetV2: a few steps are enough to beat chance (mAP 3%)."""
    options = (
        "--root", WARD, "--sources", "market1501", "--backbone", "mobilenet_v2", "--weights",
        MOBILENET, "--height", 96, "--width", 48, "--max-epoch", 1, "--optim", "sgd", "--lr", 0.01,
        "--workers", 0, "--device", "cpu", "--topk", 20,
    )  # fmt: skip
    results = protocols.main([str(option) for option in options])
    assert results["market1501"]["features"]["mAP"] > 0.12


def test_the_registry_of_torchreid_is_where_it_is_looked_for(protocols):
    """Its name is private: this test says when it has moved."""
    known = vars(torchreid.data.datasets)["__image_datasets"]
    assert {"market1501", "cuhk03", "viper", "casn_pedestrians"} <= set(known)
    assert protocols.parse_args(["--device", "cpu"]).sources == ["casn_pedestrians"]
