"""The rows of a table: the runs of each by their seeds, and what a cell says of them."""

import numpy as np
from results import Run
from studies import FAMILIES, LAMBDAS, name_of

Row = dict[int, Run]
"""The runs of one row by their seeds; those that diverged have no results."""


def spread(values: list[float | None], sign: bool = False, scale: float = 100) -> str:
    """Returns mean ± sample standard deviation of what is known, in percent.

    Example:
        >>> spread([0.5, 0.6]), spread([0.5], sign=True), spread([None])
        ('55.0 ± 7.1', '+50.0', '–')
    """
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    digits = 1 if scale == 100 else 2
    mean = f"{np.mean(known):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else mean


def higher(found: list[float]) -> str:
    """Returns how many differences are above zero, of how many.

    Example:
        >>> higher([0.1, -0.1, 0.0])
        '1 of 3'
    """
    return f"{sum(each > 0 for each in found)} of {len(found)}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_row(runs: list[Run], name: str, value: str = "") -> Row:
    """Returns the runs of one row by their seeds."""
    return {run["seed"]: run for run in runs if (run["name"], run["value"]) == (name, value)}


def results_of(row: Row, *keys: str | int) -> list[float | None]:
    """Returns one number of each run of a row, None where it diverged or there is none."""
    found = []
    for seed in sorted(row):
        value = row[seed]["results"]
        for key in keys:
            try:
                value = None if value is None else value[key]
            except (KeyError, IndexError):
                value = None
        found.append(value)
    return found


def known(row: Row, *keys: str | int) -> list[float]:
    """Returns one number of each run of a row that has it, in percent."""
    return [100 * value for value in results_of(row, *keys) if value is not None]


def rank1_and_map(row: Row, kind: str) -> str:
    """Returns a cell of rank-1 / mAP; "unit" is the features of unit length."""
    keys: list[tuple[str | int, ...]] = [("fusion", "unit", "0.0", at) for at in (0, 1)]
    if kind != "unit":
        keys = [(kind, key) for key in ("rank1", "mAP")]
    return " / ".join(spread(results_of(row, *key)) for key in keys)


def differences(row: Row, baseline: Row, *keys: str) -> list[float]:
    """Returns a row's difference to the baseline of each seed that both have."""
    seeds = [seed for seed in row if seed in baseline]
    pairs = [
        results_of({seed: row[seed]}, *keys) + results_of({seed: baseline[seed]}, *keys)
        for seed in seeds
    ]
    return [one - other for one, other in pairs if one is not None and other is not None]


def names_in(runs: list[Run]) -> list[tuple[str, str]]:
    """Returns (family, row of the table) of all there are, in the order of the table."""
    there = {run["name"] for run in runs}
    named = [(family, name_of(family, losses)) for family in FAMILIES for losses in LAMBDAS]
    return [(family, name) for family, name in named if name in there]


def protocol(runs: list[Run]) -> str:
    """Returns a sentence on how the runs were trained, from their settings."""
    s = runs[0]["settings"]
    backbones = sorted({run["settings"]["backbone"] for run in runs})
    versions = sorted({f"PyTorch {run['versions']['torch']}" for run in runs})
    initial = "from scratch" if s["weights"] == "none" else f"from {s['weights']}"
    minutes = [sum(run["seconds"].values()) / 60 for run in runs]
    data = "" if not s.get("identities") else f"the first {s['identities']} identities, "
    data += "" if not s.get("topk") else f"attention of the {s['topk']} nearest by features, "
    return (
        f"{', '.join(backbones)} {initial}, {data}{s['height']}x{s['width']}, "
        f"{s['optim'].upper()} with learning rate {s['lr']}, divided by 10 after {s['stepsize']} "
        f"of {s['max_epoch']} epochs, batches of {s['batch_size'] // 2} pairs; runs: {len(runs)}, "
        f"of {np.mean(minutes):.0f} minutes on average; {', '.join(versions)}."
    )
