"""Adds runs to a study, one after the other: ``add_results.py FILE NAME FIRST NUMBER``.

Says "added SEED" after each; the folder of the laboratory is the fifth argument.
"""

import sys
from pathlib import Path

path, name, first, number, folder = sys.argv[1:]
sys.path.insert(0, folder)

from results import Study  # noqa: E402

for seed in range(int(first), int(first) + int(number)):
    run = {"name": name, "value": "", "seed": seed, "results": {"mAP": seed / 7}}
    Study(Path(path)).add({**run, "filler": "x" * 4000})
    print(f"added {seed}", flush=True)
