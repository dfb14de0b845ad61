"""The long run: python tests/reliability/run.py --kills 100 --fuzz 10000 --files 2000."""

import argparse
import sys

import torch
from arguments import fuzz
from damage import damage
from full_disk import full_disk
from kill import kill


def main() -> int:
    """Returns 1 where anything was found, having printed it and a table of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="processes killed while they write")
    parser.add_argument("--fuzz", type=int, default=10_000, help="calls with a wrong argument")
    parser.add_argument("--files", type=int, default=2_000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "files": lambda: damage(args.files, args.seed), "full disk": full_disk,
        "kill": lambda: kill(args.kills, args.seed),
        "arguments": lambda: fuzz(args.fuzz, args.seed),
    }  # fmt: skip
    table, found = [f"| torch {torch.__version__} | figures |", "| --- | --- |"], 0
    for name, part in parts.items():
        figures, findings = part()
        found += len(findings)
        for text in sorted(findings):
            print(f"{name}: {text}")
        table.append(f"| {name} | {', '.join(f'{key} {n}' for key, n in figures.items())} |")
    print("\n".join(table))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
