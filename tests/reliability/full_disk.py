"""A disk that is full, played by a limit of the size of files: the old files stay."""

import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
from subjects import tiny_casn
from writer import WRITERS

from casn_plugin import GalleryIndex

LIMIT = 10_000


def full_disk() -> tuple[dict[str, int], list[str]]:
    """Returns how many writes were refused, and what was found."""
    findings, refused = [], 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for kind, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            if kind == "index":
                GalleryIndex.create(folder, tiny_casn())
            write(folder, 1)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
            try:
                write(folder, 2)
                findings.append(f"{kind}: nothing was refused")
            except (OSError, ValueError) as error:
                refused += 1
                if root not in str(error):
                    findings.append(f"{kind}: no file is named: {error}")
            except Exception as error:
                findings.append(f"{kind}: raw {type(error).__name__}: {error}")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            if {path.name: path.read_bytes() for path in folder.iterdir()} != before:
                findings.append(f"{kind}: the folder is not as it was")
    return {"kinds": len(WRITERS), "refused": refused}, findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, found = full_disk()
    print(*found, totals, sep="\n")
    sys.exit(bool(found))
