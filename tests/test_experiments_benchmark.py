"""The benchmark of ranking, on little."""

import mmap
import time

import numpy as np
import pytest
import torch
from conftest import cells
from PIL import Image

from casn_plugin import CASN, GalleryIndex, attention_distmat, rank_gallery
from casn_plugin.engine import EmbeddedPedestrians

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def benchmark(lab):
    """The benchmark as a module."""
    return lab("benchmark_ranking")


def test_the_benchmark_measures_speed_and_exactness(benchmark, tmp_path):
    arguments = [
        *("--only", "speed", "exactness", "--heads", "OSNet", "--repeats", "1", "--scale", "0.1"),
        *("--device", "cpu", "--save-dir", str(tmp_path)),
    ]
    speed, exactness = benchmark.main(arguments)
    assert (tmp_path / "cpu.md").read_text(encoding="utf-8") == f"{speed}\n{exactness}"
    rates = {row[1]: float(row[2].replace(",", "")) for row in cells(speed)[1:]}
    assert rates["ours, float32"] > rates["autograd, one pair at a time"]
    kinds = {row[1]: row[2:] for row in cells(exactness)}
    assert kinds["float64"][0] == "0 of 65,536" and float(kinds["float64"][2]) < 1e-12
    assert float(kinds["float32"][2]) < 1e-4 < float(kinds["bfloat16"][2])


def test_the_benchmark_measures_what_shortlists_cost(benchmark, lab, monkeypatch, tmp_path):
    sizes = {"num_train_pids": 2, "num_test_pids": 4, "images_per_camera": 2, "progress": False}
    monkeypatch.setattr(EmbeddedPedestrians, "options", sizes)
    checkpoint = tmp_path / "model.pth"
    options = lab("protocols").parse_args(["--device", "cpu"])
    torch.save({"state_dict": lab("backbones").build_model(options, 2).state_dict()}, checkpoint)
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "quality"])
    arguments = ["--only", "quality", "--checkpoint", str(checkpoint), "--device", "cpu"]
    (table,) = benchmark.main([*arguments, "--save-dir", str(tmp_path)])
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["all pairs, float32"][2:] == rows["shortlist of 500"][2:]
    assert sum("exact top" in name for name in rows) == 3


def test_the_benchmark_compares_evaluations(benchmark, lab):
    options = benchmark.parse_args(["--scale", "0.05", "--repeats", "1", "--device", "cpu"])
    text = lab("benchmark_speed").evaluation(options)
    assert "168 × 986 distances (cpu): CMC equal, mAP off by" in text
    rows = {row[0]: row[1:] for row in cells(text)[1:]}
    assert rows["ours, with mINP"][2] == "1.00" and float(rows["ranked_lists"][2]) > 0


def test_the_benchmark_of_an_index(lab, monkeypatch, tmp_path):
    sizes = {"num_train_pids": 2, "num_test_pids": 4, "images_per_camera": 2, "progress": False}
    monkeypatch.setattr(EmbeddedPedestrians, "options", sizes)
    checkpoint = tmp_path / "model.pth"
    options = lab("protocols").parse_args(["--device", "cpu"])
    torch.save({"state_dict": lab("backbones").build_model(options, 2).state_dict()}, checkpoint)
    index = lab("benchmark_index")
    with pytest.raises(SystemExit):
        index.main(["--checkpoint", str(tmp_path / "none")])
    found = index.main([
        "--checkpoint", str(checkpoint), "--images", "8", "--size", "64", "32",
        "--searches", "2", "--repeats", "1", "--folder", str(tmp_path),
    ])  # fmt: skip
    whole, half, eight_bits, alone = cells(found)[1:]
    sizes = [float(row[1].split()[0]) for row in (whole, half, eight_bits, alone)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 10
    assert float(whole[-1]) < 1e-5 and 0 < float(half[-3]) < float(eight_bits[-3])
    assert float(alone[-1]) < 1e-3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_the_benchmark_compares_reranking(benchmark):
    options = benchmark.parse_args(["--scale", "0.1", "--repeats", "1"])
    header, *rows = cells(benchmark.reranking(options))
    assert header[3] == "× torchreid" and len(rows) == 6 * 4 + 1
    kinds = {row[1]: row for row in rows[8:12]}
    assert float(kinds["matrices"][3]) > 3  # 500 images; at 5,000 more than 20
    assert float(kinds["matrices"][4].removeprefix("off by ")) < 2e-6
    assert all("same nearest" in kinds[name][4] for name in ("lists", "lists, greatest known"))


def test_the_benchmark_compares_processes_and_memory(benchmark, lab):
    peaks = lab("benchmark_memory").Peak()
    with peaks:  # from the system: what was freed before may be given out again
        held = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(held, np.uint8)[:] = 1
        time.sleep(0.05)
    assert 60 < peaks.peak / 2**20 < 100 and len(held)
    rows = cells(benchmark.processes(benchmark.parse_args(["--scale", "0.1"])))[1:]
    assert rows[0][-1] == rows[2][-1] == "yes"  # with two threads, sums may round otherwise


def test_the_benchmark_measures_the_memory_of_ranking_from_disk(lab, tmp_path):
    memory, plots = lab("benchmark_memory"), lab("plots")
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 512, 3, stride=16, padding=1))
    model = CASN(backbone, forward=memory.pooled_forward, input_size=(256, 128))
    index = GalleryIndex.create(tmp_path / "index", model)
    index.add(memory.small_head().encode(128))
    for function in (attention_distmat, rank_gallery):
        peaks = memory.peak_of(str(tmp_path / "index"), function, "cpu")
        assert 0 <= peaks["of the host"] < 2 * memory.BUDGET / 2**20
    figure = plots.plot_memory([64, 128], {"on disk": [16.5, 33.0]}, 64, "cpu")
    plots.save_small(figure, tmp_path / "memory.png")
    with Image.open(tmp_path / "memory.png") as picture:
        assert picture.mode == "P"  # 256 colours
    with pytest.raises(ValueError, match=r"expected a \.png or \.webp"):
        plots.save_small(figure, tmp_path / "memory.jpg")


def test_the_benchmark_of_pairs_counts_them(lab):
    arguments = ["--backbones", "osnet_x0_25", "--size", "64", "32", "--batch-size", "16"]
    found = lab("benchmark_pairs").main([*arguments, "--repeats", "1", "--device", "cpu"])
    rows = {row[1]: row for row in cells(found)[1:]}
    numbers = {"L_ide alone": 0, "rows of pairs": 8, "chosen, as many as rows": 8, "all": 120}
    assert {name: int(rows[name][2]) for name in numbers} == numbers
    assert float(rows["all"][4]) > 0 and rows["rows of pairs"][5] == "1.00"


def test_the_benchmark_of_similarity(lab):
    speed, exactness = lab("benchmark_similarity").main(
        ["--heads", "OSNet", "--repeats", "1", "--scale", "0.1"]
    )
    rates = {row[1]: float(row[2].replace(",", "")) for row in cells(speed)[1:]}
    assert rates["closed form, similarity"] > rates["autograd, batches of 16 pairs"]
    ((_, double, single),) = cells(exactness)[1:]
    assert float(double.split()[0]) < 1e-10 < float(single.split()[0]) < 1e-4


@pytest.mark.usefixtures("unchecked")  # the compiler takes minutes to look at checks of shapes
def test_the_benchmark_of_training(lab):
    pytest.importorskip("timm")
    networks = ["timm:vit_tiny_patch16_224"]
    arguments = ["--networks", *networks, "--size", "64", "32", "--repeats", "1", "--device", "cpu"]
    costs, settings = lab("benchmark_training").main([*arguments, "--batch-size", "4"])
    header, *rows = cells(costs)
    assert [row[0] for row in rows] == networks and "Host reads" in header
    for row in rows:
        floor, masked, siamese, both = map(float, row[2:6])
        assert 1.6 < floor <= masked <= both < 1.9 and 1 <= siamese < 1.12
        assert float(row[6].removesuffix(" ms")) > 0
        assert 1.5 < float(row[12]) < 2.2 and row[14] == "1"
    assert [row[1] for row in cells(settings)[1:4]] == ["float32", "channels last", "bfloat16"]


def test_flops_of_depthwise_convolutions_are_counted_by_their_groups(lab):
    flops = lab("benchmark_training").flops
    for groups in (1, 8):
        layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
        imgs = torch.rand(2, 8, 6, 5, requires_grad=True)
        one = 2 * 2 * 6 * 5 * 8 * (8 // groups) * 9  # multiplied and added, for each weight used
        assert flops(lambda layer=layer, imgs=imgs: layer(imgs).sum().backward()) == 3 * one
    layer = torch.nn.ConvTranspose2d(8, 4, 2, stride=2, groups=4, bias=False)
    one = 2 * 2 * 6 * 5 * 8 * 4
    assert flops(lambda: layer(imgs.detach()).sum().backward()) == 2 * one
