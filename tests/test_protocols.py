"""The presets of the main example: the paper's settings, and a dry run of each on its layout.

Each data set is a folder tree of rendered pedestrians, laid out as its own release is, which
torchreid's own reader reads.
"""

import argparse
import json
import math
import re
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import cv2
import h5py
import numpy as np
import pytest
from scipy.io import savemat

from casn_plugin import CASN, ImageCASNEngine
from casn_plugin.pedestrians import render_pedestrian

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENTS = DOCS / "guides" / "protocols.md", DOCS / "paper.md"
HEIGHT, WIDTH = 64, 32


@pytest.fixture(autouse=True)
def in_an_empty_folder_without_network(tmp_path, monkeypatch):
    def fail(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", fail)


@lru_cache
def render(pid: int, camid: int, index: int) -> np.ndarray:
    """Returns a small picture, RGB."""
    image, _ = render_pedestrian(pid, camid, index, height=HEIGHT, width=WIDTH)
    return image


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def shots(pids: range, cameras: int, each: int) -> Iterator[tuple[int, int, int]]:
    """Yields (pid, camid, index) of everyone in every camera."""
    for pid in pids:
        for camid in range(cameras):
            for index in range(each):
                yield pid, camid, index


def market1501(root: Path) -> None:
    """Writes two people to train and three to test, with a distractor and a junk picture."""
    folder = root / "market1501" / "Market-1501-v15.09.15"
    for pid, camid, index in shots(range(2, 12, 2), 2, 2):
        part = "bounding_box_train" if pid < 6 else "bounding_box_test" if index else "query"
        name = f"{pid:04d}_c{camid + 1}s1_{1051 + 25 * index:06d}_0{index}.jpg"
        save(folder / part / name, render(pid, camid, index))
    save(folder / "bounding_box_test" / "0000_c1s1_000151_01.jpg", render(20, 0, 0))
    save(folder / "bounding_box_test" / "-1_c1s1_000401_03.jpg", render(21, 0, 0))
    for name in ("readme.txt", "bounding_box_train/Thumbs.db"):
        (folder / name).write_text("no picture")


def dukemtmcreid(root: Path) -> None:
    """Writes two people to train, three to test and a distractor seen by one camera."""
    folder = root / "dukemtmc-reid" / "DukeMTMC-reID"
    for pid, camid, index in shots(range(1, 6), 2, 2):
        part = "bounding_box_train" if pid < 3 else "bounding_box_test" if index else "query"
        name = f"{pid:04d}_c{camid + 7}_f{46182 + 120 * index:07d}.jpg"
        save(folder / part / name, render(pid, camid, index))
    save(folder / "bounding_box_test" / "7139_c8_f0187857.jpg", render(20, 1, 0))
    (folder / "README.md").write_text("no picture")


def msmt17(root: Path) -> None:
    """Writes two people to train, whose last picture is for validation, and three to test."""
    folder = root / "msmt17" / "MSMT17_V1"
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}
    for person, camid, index in shots(range(5), 2, 3):
        test = person >= 2
        pid = person - 2 if test else person  # either half is numbered from 0
        name = f"{pid:04d}/{pid:04d}_{index:03d}_{camid + 14:02d}_0303morning_{index:04d}_0.jpg"
        save(folder / ("test" if test else "train") / name, render(person + 1, camid, index))
        parts = ("query", "gallery", "gallery") if test else ("train", "train", "val")
        lists[parts[index]].append(f"{name} {pid}\n")
    for part, lines in lists.items():
        (folder / f"list_{part}.txt").write_text("".join(lines))


def cuhk03(root: Path) -> None:
    """Writes the MATLAB files: two people to train and five to test, in five pairs of cameras.

    A person has ten cells, five of each camera, of which three are filled here. The detector missed
    one picture of the first person.
    """
    folder = root / "cuhk03"
    (folder / "cuhk03_release").mkdir(parents=True)
    people = (2, 2, 1, 1, 1)  # of each pair of cameras; 843, 440, 77, 58 and 49 in the release
    train = [(0, 0), (1, 0)]
    with h5py.File(folder / "cuhk03_release" / "cuhk-03.mat", "w") as mat:

        def cells(values: list[np.ndarray], rows: int) -> np.ndarray:
            """Returns references to arrays, as MATLAB has them: apart, and column by column."""
            references = np.empty(len(values), dtype=h5py.ref_dtype)
            for i, value in enumerate(values):
                name = f"#refs#/{len(mat.get('#refs#', ()))}"
                references[i] = mat.create_dataset(name, data=value).ref
            return references.reshape(rows, -1).T

        for kind in ("detected", "labeled"):
            listed: list[tuple[str, int, str]] = []  # file name, pid, part
            pairs = []
            for pair, number in enumerate(people):
                images = []
                for person, view, index in shots(range(number), 2, 5):
                    missed = kind == "detected" and (pair, person, view, index) == (0, 0, 0, 2)
                    if missed or index > 2:
                        images.append(np.zeros(2, np.uint64))  # an empty array
                        continue
                    pid = 10 * pair + person + 1
                    images.append(render(pid, view, index).T)
                    name = f"{pair + 1}_{person + 1:03d}_{view + 1}_{5 * view + index + 1:02d}.png"
                    part = "gallery" if index else "query"
                    listed.append((name, pid, "train" if (pair, person) in train else part))
                pairs.append(cells(images, number))
            mat.create_dataset(kind, data=cells(pairs, 5))
            config = {
                f"{part}_idx": [[i] for i, row in enumerate(listed, 1) if row[2] == part]
                for part in ("train", "query", "gallery")
            }
            names = np.empty((len(listed), 1), dtype=object)
            names[:, 0] = [row[0] for row in listed]
            labels = [[row[1]] for row in listed]
            savemat(
                folder / f"cuhk03_new_protocol_config_{kind}.mat",
                {**config, "filelist": names, "labels": labels},
            )
        classic = np.array([[1.0, 2.0], [2.0, 2.0]]).T  # pair and person of who is to test
        mat.create_dataset("testsets", data=cells([classic] * 20, 20))


LAYOUTS = {
    "market1501": market1501,
    "cuhk03": cuhk03,
    "dukemtmcreid": dukemtmcreid,
    "msmt17": msmt17,
}
COUNTS = {  # identities and pictures: to train, of the queries, of the gallery
    "market1501": ((2, 8), (3, 6), (4, 7)),  # junk is left out, the distractor kept
    "cuhk03-detected": ((2, 11), (5, 10), (5, 20)),
    "cuhk03-labeled": ((2, 12), (5, 10), (5, 20)),
    "dukemtmcreid": ((2, 8), (3, 6), (4, 7)),
    "msmt17": ((2, 8), (3, 6), (3, 12)),  # what is for validation is not trained on
}
BACKBONES = {"ide": ("ide", 288, 144), "pcb": ("pcb_p6", 384, 128)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reid-data")
    for write in LAYOUTS.values():
        write(folder)
    return folder


def parse(example: ModuleType, *options: object) -> argparse.Namespace:
    return example.parse_args(example.make_parser(), [str(option) for option in options])


@pytest.mark.parametrize("net", BACKBONES)
@pytest.mark.parametrize("data", COUNTS)
def test_a_preset_is_the_papers_protocol(example, root, data, net):
    args = parse(example, "--preset", f"{data}-{net}", "--root", root)
    assert args.sources == [data.split("-")[0]]
    assert (args.backbone, args.height, args.width) == BACKBONES[net]
    assert (args.optim, args.lr, args.batch_size) == ("sgd", 0.03, 16)
    assert (args.max_epoch, args.stepsize, args.weights) == (40, 30, "imagenet")
    assert (args.lambda_ia, args.lambda_sa, args.label_smooth) == (0.5, 0.05, False)


def test_the_documented_commands_are_all_presets(example, lab, root):
    text = "".join(each.read_text(encoding="utf-8") for each in DOCUMENTS)
    text = text.replace("reid-data", str(root))
    commands = re.findall(r"^python examples/train_casn_pcb.py (.*)", text, re.MULTILINE)
    parsed = [parse(example, *command.split()) for command in commands]
    assert {args.preset for args in parsed} | {"embedded", "paper"} == set(example.PRESETS)
    for name in ("protocols", "ablation"):
        script = re.escape(f"python examples/experiments/{name}.py")
        commands = re.findall(rf"^{script} (.*)", text, re.MULTILINE)
        assert commands and all(lab(name).parse_args(command.split()) for command in commands)


def test_the_papers_identity_classifier_has_two_layers(example, root):
    args = parse(example, "--preset", "market1501-ide", "--root", root, "--weights=none")
    model = CASN(example.build_backbone(args, 751), input_size=(args.height, args.width))
    assert [(layer.in_features, layer.out_features) for layer in model.classifier[::2]] == [
        (2048, 512), (512, 751),
    ]  # fmt: skip
    assert model.pair_classifier[0].in_features == 2048  # f is taken before them


def test_a_missing_data_set_is_named_and_not_downloaded(example, root, tmp_path, capsys):
    for name in ("market1501", "cuhk03-labeled", "dukemtmcreid", "msmt17"):
        with pytest.raises(SystemExit) as stopped:
            example.main(["--preset", f"{name}-pcb", "--root", "elsewhere"])
        assert stopped.value.code == 2
        assert re.search(
            r"is expected in elsewhere.(market|cuhk|duke|msmt)", capsys.readouterr().err
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def engines(example, monkeypatch) -> list[ImageCASNEngine]:
    """The engines that the example builds.

    Gradients are held small: from random weights, on ten pictures of two people and with the
    paper's learning rate, the one step may take a ResNet-50 so far that its features overflow.
    """
    built, build = [], example.build_engine

    def recorded(*args: object, **kwargs: object) -> ImageCASNEngine:
        built.append(build(*args, **kwargs))
        for parameter in built[-1].casn.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return built[-1]

    monkeypatch.setattr(example, "build_engine", recorded)
    return built


@pytest.mark.parametrize("net", BACKBONES)
@pytest.mark.parametrize("data", COUNTS)
def test_a_dry_run_on_the_data_sets_own_layout(
    example, root, data, net, capsys, engines, monkeypatch
):
    """All of the preset but pictures of full size, 40 epochs and a download."""
    preset = f"{data}-{net}"
    small = {"height": HEIGHT, "width": WIDTH}
    monkeypatch.setitem(example.PRESETS, preset, example.PRESETS[preset] | small)
    options = (
        "--preset", preset, "--root", root, "--max-epoch", 1, "--weights", "none", "--workers", 0,
        "--device", "cpu", "--save-dir", "log", "--gallery-dir", "gallery",
    )  # fmt: skip
    results = example.main([str(option) for option in options])

    (engine,) = engines
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.03}
    assert {group["momentum"] for group in engine.optimizer.param_groups} == {0.9}
    assert (engine.scheduler.step_size, engine.scheduler.gamma) == (30, 0.1)
    assert (engine.lambda_ia, engine.lambda_sa, engine.criterion.eps) == (0.5, 0.05, 0)
    assert engine.siamese.consistency_weight == 0.2  # α of Eq. 5
    assert engine.train_loader.batch_size == 16 and len(engine.train_loader) > 0

    said = capsys.readouterr().out
    found = [
        tuple(int(number) for number in re.search(rf"{part} +\| +(\d+) \| +(\d+)", said).groups())
        for part in ("train", "query", "gallery")
    ]
    assert tuple(found) == COUNTS[data]
    name = data.split("-")[0]
    assert set(results) == {name}
    for ranking in ("features", "attention", "fused"):
        assert 0 < results[name][ranking]["mAP"] <= 1
    assert 0 <= results[name]["auc"] <= 1

    saved = json.loads(Path("log", "results.json").read_text())
    (epoch,) = saved["history"]
    terms = {"loss", "loss_ide", "loss_ia", "loss_sa", "loss_bce", "attention_distance"}
    assert terms <= set(epoch) and all(math.isfinite(value) for value in epoch.values())
    assert Path("log", f"pairs_{name}.png").is_file() and not list(Path("gallery").iterdir())
    Path("log", "model", "model.pth.tar-1").unlink()  # a few hundred megabytes


def test_the_fused_ranking_takes_the_weight_of_the_attention(lab, root):
    """PCB's features have one length, so without attention the fused ranking is theirs."""
    options = (
        "--sources", "market1501", "--root", root, "--height", HEIGHT, "--width", WIDTH,
        "--batch-size", 8, "--max-epoch", 1, "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    main, options = lab("protocols").main, [str(option) for option in options]
    found = main([*options, "--attention-weight", "0"])["market1501"]
    assert found["fused"] == found["features"] != found["attention"]
    found = main([*options, "--attention-weight", "1000"])["market1501"]
    assert found["fused"] == found["attention"] != found["features"]
