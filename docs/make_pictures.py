#!/usr/bin/env python
"""Makes all pictures of these documents, as small as they can be without visible loss.

The plots of docs/results, of docs/benchmarks.md's table and the sheet of pedestrians:

    python docs/make_pictures.py

and with a checkpoint also those that show a trained model on the embedded data set:

    python examples/train_casn_pcb.py
    python docs/make_pictures.py log/casn_pcb/model/model.pth.tar-10

Those of the report and of the search need Chromium and chromedriver, and are left as they are
without them.
With torchvision's weights of MobileNetV2 it draws what a network that never saw CASN finds alike:

    python docs/make_pictures.py --mobilenet mobilenet_v2-b0353104.pth
"""

import argparse
import copy
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from method_figure import DARK, LIGHT, Seen, method_figure
from PIL import Image

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
sys.path[:0] = [str(DOCS.parent / "examples" / name) for name in ("experiments", "")]

import explain_any_network  # noqa: E402
import explain_matches  # noqa: E402
import search_pictures  # noqa: E402
import train_casn_pcb  # noqa: E402
from plots import plot_memory, save_small  # noqa: E402
from tables import write_report  # noqa: E402

from casn_plugin import CASN, IdentificationAttentionLoss, explain_ranking, grad_cam  # noqa: E402
from casn_plugin.explanation import FixedPairs, PairExplanation, overlay  # noqa: E402
from casn_plugin.pedestrians import render_pedestrian  # noqa: E402
from casn_plugin.scores import identity_scores  # noqa: E402


def draw_memory() -> None:
    """Plots the table of peak memory in benchmarks.md."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \|(.*MiB.*)\|$", text, re.MULTILINE)
    values = [re.findall(r"([\d,]+) MiB", cells) for _, cells in rows]
    names = ("the gallery itself, on disk", "attention_distmat, of the host",
             "rank_gallery, of the host")  # fmt: skip
    curves = {
        name: [float(value.replace(",", "")) for value in column]
        for name, column in zip(names, zip(*values, strict=True), strict=True)
    }
    images = [int(number.replace(",", "")) for number, _ in rows]
    save_small(plot_memory(images, curves, 64, "cpu"), IMAGES / "ranking_memory.png")


def draw_pedestrians() -> None:
    """Draws two pictures of eight people in each of six cameras."""
    rows = [
        np.hstack(
            [
                render_pedestrian(pid, camid, index, height=128, width=64)[0]
                for camid in range(6)
                for index in range(2)
            ]
        )
        for pid in (1, 2, 3, 5, 6, 9, 10, 11)
    ]
    save_small(np.vstack(rows), IMAGES / "pedestrians.webp")


def draw_model(checkpoint: str) -> None:
    """Ranks with a checkpoint and draws what the model does."""
    parser = train_casn_pcb.make_parser()
    args = train_casn_pcb.parse_args(parser, ["--test-only", "--weights", checkpoint])
    engine = train_casn_pcb.build_engine(args)
    engine.run(test_only=True)
    (name,) = engine.results
    explained = engine.explain(name)
    best = next(explained.best()).matches[0].pair
    save_small(best.plot(), IMAGES / "explained_pair.webp")
    draw_method(engine.casn, best)
    failures = explained.ranked.failures()
    typical = explained[failures[len(failures) // 2]]  # the middle of all failures
    save_small(typical.plot(), IMAGES / "explained_failure.webp")
    query, gallery = (engine.test_loader[name][part].dataset for part in ("query", "gallery"))
    pairs = FixedPairs(query, gallery, engine.logged_pairs)
    mosaic = pairs.mosaic(engine.casn)
    save_small(as_bytes(mosaic), IMAGES / "tensorboard.webp")
    if shutil.which("chromedriver"):
        with tempfile.TemporaryDirectory() as folder:
            page = str(Path(folder) / "report.html")
            explain_matches.main(["--checkpoint", checkpoint, "--out", page])
            save_small(photograph(Path(page), "#worst"), IMAGES / "report.webp")
        draw_search(checkpoint)


def draw_method(trained: CASN, pair: PairExplanation) -> None:
    """Draws the method, with a pair, its maps, and what L_ia hides of the first picture.

    These people were in no training set: M_n is of the identity that scores highest.
    """
    model = copy.deepcopy(trained).requires_grad_(False).eval()
    model.training = model.backbone.training = True  # so that logits are given
    picture = pair.first.picture
    imgs = model.preprocessing.load(Image.fromarray(as_bytes(picture)))[None]
    output = model(imgs.to(next(model.parameters()).device))
    pids = torch.stack(list(output.logits)).sum(0).argmax(1)
    maps = grad_cam(identity_scores(output.logits, pids), output.activations)
    masked = IdentificationAttentionLoss().mask(imgs, pids, output.logits, output.activations)
    seen = Seen(
        [as_bytes(each.picture) for each in (pair.first, pair.second)],
        as_bytes(overlay(picture[None], maps)[0]),
        as_bytes(model.preprocessing.pictures(masked.detach())[0]),
        [as_bytes(each.overlaid) for each in (pair.first, pair.second)],
        [each.aligned.numpy() for each in (pair.first, pair.second)],
    )
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        drawn = method_figure(seen, colours)
        (IMAGES / f"method-{name}.svg").write_text(drawn, encoding="utf-8")


def as_bytes(picture: np.ndarray) -> np.ndarray:
    """Returns a picture in [0, 1] as 0 to 255."""
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def draw_search(checkpoint: str) -> None:
    """Searches for two rendered people, one of whom is in no picture, and photographs the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def render(place: str, pid: int, camid: int, index: int) -> str:
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            picture, _ = render_pedestrian(pid, camid, index, height=128, width=64)
            Image.fromarray(picture).save(path)
            return str(path)

        for number in range(240):  # twenty people nobody was trained on, in each of four cameras
            pid, camid, index = 5001 + number % 20, 1 + number // 20 % 4, 1 + number // 80
            render(f"gallery/camera {camid}/{number:04}.png", pid, camid, index)
        for number in range(300):  # fifty others, to calibrate on
            pid, camid, index = 5101 + number % 50, number // 50 % 3, number // 150
            render(f"others/{pid}_c{camid}s1_{index:06}_00.png", pid, camid, index)
        queries = [render(f"{who}.png", pid, 0, 0) for who, pid in (("seen", 5004), ("new", 5060))]
        (folder / "gallery" / "camera 1" / "cut.jpg").write_bytes(b"\xff\xd8")
        os.chdir(folder)
        search_pictures.main([
            "--gallery", "gallery", "--query", *(Path(each).name for each in queries),
            "--checkpoint", checkpoint, "--pattern", r"(?:camera |(?P<pid>\d+)_c)(?P<camid>\d+)",
            "--calibrate", "others", "--false-alarm-rate", "0.01", "--topk", "8",
        ])  # fmt: skip
        page = folder / "search.html"
        save_small(photograph(page, "#found"), IMAGES / "search.webp")
        save_small(photograph(page, "#found", 375, 812), IMAGES / "search_phone.webp")


def draw_similarity(weights: str) -> None:
    """Draws what MobileNetV2, trained on ImageNet, finds alike in one picture of each of 12 people.

    Args:
        weights: torchvision's.
    """
    model = explain_any_network.load_model("mobilenet_v2", weights)
    pictures = [
        [
            (
                Image.fromarray(render_pedestrian(pid, camid, 0, height=256, width=128)[0]),
                pid,
                camid,
            )
            for pid in range(1, 13)
        ]
        for camid in (0, 1)
    ]
    explained = explain_ranking(model, pictures[0][:1], pictures[1], topk=5)
    save_small(explained[0].plot(), IMAGES / "explained_similarity.webp")


def photograph(page: Path, anchor: str, width: int = 1280, height: int = 1100) -> Image.Image:
    """Returns how a page looks in Chromium from an anchor on."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    screen = {"width": width, "height": height, "mobile": width < 1000}
    sharp = {"deviceScaleFactor": 2 if width < 1000 else 1}
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen | sharp)
        driver.get(page.resolve().as_uri())
        driver.execute_script(f"document.querySelector('{anchor}').scrollIntoView()")
        return Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    finally:
        driver.quit()


def main() -> None:
    """Draws all that can be drawn; what shows a trained model needs its checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="of the example")
    parser.add_argument("--mobilenet", help="torchvision's weights of MobileNetV2")
    args = parser.parse_args()
    write_report(DOCS / "results.md", DOCS / "results")
    draw_memory()
    draw_pedestrians()
    if args.checkpoint is not None:
        draw_model(os.path.abspath(args.checkpoint))
    if args.mobilenet is not None:
        draw_similarity(args.mobilenet)


if __name__ == "__main__":
    main()
