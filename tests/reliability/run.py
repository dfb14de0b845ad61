"""The long run, by one command: python tests/reliability/run.py; see docs/reliability.md."""

import argparse
import sys
import time
from collections import Counter

import torch
from arguments import fuzz
from damage import damage, every_byte
from full_disk import full_disk
from kill import kill
from manifests import manifests
from pictures import pictures
from soak import TOLERANCE, for_minutes, soak
from two_writers import two_writers

PARTS = {
    "two writers": lambda args: two_writers(args.writers, args.seed),
    "kills": lambda args: kill(args.kills, args.seed),
    "full disk": lambda args: full_disk(),
    "files": lambda args: damage(args.files, args.seed),
    "every byte": lambda args: every_byte(args.seed),
    "manifests": lambda args: manifests(args.manifests, args.seed),
    "pictures": lambda args: pictures(args.pictures, args.seed),
    "arguments": lambda args: fuzz(args.fuzz, args.seed),
    "soak": lambda args: soak(for_minutes(args.minutes), TOLERANCE),
}
"""What is attacked; what starts processes comes first, as long as there is but one thread."""


def main() -> int:
    """Returns 1 where anything was found, having printed it and a table of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writers", type=int, default=20, help="runs of two writers of one index")
    parser.add_argument("--kills", type=int, default=100, help="processes killed while they write")
    parser.add_argument("--files", type=int, default=2_000, help="damaged files")
    parser.add_argument("--manifests", type=int, default=4_000, help="manifests nobody wrote")
    parser.add_argument("--pictures", type=int, default=10_000, help="pictures, whole and damaged")
    parser.add_argument("--fuzz", type=int, default=10_000, help="calls with a wrong argument")
    parser.add_argument("--minutes", type=float, default=60, help="of training and ranking")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, found = [f"| torch {torch.__version__} | figures | minutes |", "| --- | --- | ---: |"], 0
    for name in args.only:
        began = time.monotonic()
        figures, findings = PARTS[name](args)
        found += len(findings)
        for text, count in sorted(Counter(findings).items()):
            print(f"{name}: {count} x {text}", flush=True)
        shown = ", ".join(f"{key} {number}" for key, number in figures.items())
        table.append(f"| {name} | {shown} | {(time.monotonic() - began) / 60:.1f} |")
        print(table[-1], flush=True)
    print("\n".join(table))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
