"""Copies the examples, short files to start from: ``python -m casn_plugin examples``."""

import argparse
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def examples() -> list[Path]:
    """Returns the files of the examples: of this checkout, or as they were installed.

    Example:
        >>> "train_casn_pcb.py" in [path.name for path in examples()]
        True
    """
    here = Path(__file__).resolve().parents[1] / "examples"
    if here.is_dir():
        return sorted(here.glob("*.py"))
    try:
        listed = files("casn-plugin") or []
    except PackageNotFoundError:
        listed = []
    return sorted(
        Path(str(each.locate()))
        for each in listed
        if each.parts[-3:-1] == ("casn-plugin", "examples")
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Copies the examples to a folder, and says how to begin; no file is replaced."""
    parser = argparse.ArgumentParser(
        prog="python -m casn_plugin", usage="%(prog)s FOLDER", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="where to; made if need be")
    folder: Path = parser.parse_args(argv).folder
    found = examples()
    if not found:
        parser.error("the examples were not installed: they are in the sdist of casn-plugin")
    there = [path.name for path in found if (folder / path.name).exists()]
    if there:
        parser.error(f"{folder} has {there[0]} already, and no file is replaced")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        parser.error(str(error))
    print(f"Copied {len(found)} examples. Begin with: python {folder / 'train_casn_pcb.py'}")


if __name__ == "__main__":
    main()
