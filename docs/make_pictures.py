#!/usr/bin/env python
"""Makes the pictures of these documents that show a trained model on the embedded data set.

    python examples/train_casn_pcb.py
    python docs/make_pictures.py log/casn_pcb/model/model.pth.tar-10

The last one, of the report, needs Chromium and chromedriver, and is left as it is without them.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

IMAGES = Path(__file__).parent / "images"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import explain_matches  # noqa: E402
import train_casn_pcb  # noqa: E402


class Drawn:
    """Takes the place of TensorBoard's writer and keeps what it is given."""

    picture: Any = None

    def add_image(self, tag: str, picture: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps a picture."""
        self.picture = picture

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Drops a number."""


def photograph(page: Path, to: Path) -> None:
    """Saves how a page looks in Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1250"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.get(page.resolve().as_uri())
        driver.execute_script("document.querySelector('#worst').scrollIntoView()")
        driver.save_screenshot(str(to))
    finally:
        driver.quit()


def main(checkpoint: str) -> None:
    """Ranks with a checkpoint and saves the pictures."""
    args = train_casn_pcb.parse_args(["--test-only", "--weights", checkpoint])
    engine = train_casn_pcb.build_engine(args)
    engine.run(test_only=True)
    (name,) = engine.results
    explained = engine.explain(name)
    next(explained.best()).matches[0].pair.plot().savefig(IMAGES / "explained_pair.png")
    failures = explained.ranked.failures()
    typical = explained[failures[len(failures) // 2]]  # the middle of all failures
    typical.plot().savefig(IMAGES / "explained_failure.png")
    engine.writer = drawn = Drawn()
    engine._log_attention()
    matplotlib.image.imsave(IMAGES / "tensorboard.png", np.clip(drawn.picture, 0, 1))
    if shutil.which("chromedriver"):
        with tempfile.TemporaryDirectory() as folder:
            page = str(Path(folder) / "report.html")
            explain_matches.main(["--checkpoint", checkpoint, "--out", page])
            photograph(Path(page), IMAGES / "report.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
