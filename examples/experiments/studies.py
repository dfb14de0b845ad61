"""What is studied: the rows of the paper's Table 3, and the choices that the paper leaves open.

A row or a choice is a list of options of protocols.py; a run is one of them with a seed.
"""

from collections.abc import Iterator
from typing import Any

STUDIES = ("table", "choices", "evidence", "readings")
LAMBDAS = {"": (0.0, 0.0), "+IA": (0.5, 0.0), "+SA": (0.0, 0.05), "CASN": (0.5, 0.05)}
FAMILIES = ("IDE", "PCB")
TITLES = {
    "embedded": "Embedded set of rendered pedestrians",
    "ward": "WARD (Martinel and Micheloni, 2012): real pictures of 70 people, three cameras",
}
_MOBILE = ["--height", "160", "--width", "64", "--optim", "sgd", "--lr", "0.03"]
# options of each family, by the backbone of IDE; the small ones train ten epochs, as the embedded
# preset does
PROTOCOLS: dict[str, dict[str, list[str]]] = {
    "resnet_slim": {"IDE": ["--backbone", "resnet_slim"], "PCB": ["--backbone", "pcb_slim"]},
    "mobilenet_v2": {
        "IDE": ["--backbone", "mobilenet_v2", *_MOBILE],
        "PCB": ["--backbone", "mobilenet_pcb", *_MOBILE],
    },
    "resnet50": {"IDE": ["--preset", "market1501-ide"], "PCB": ["--preset", "market1501-pcb"]},
}
# by the row of the table that is varied, the smallest that has the choice
CHOICES: dict[str, dict[str, dict[str, list[str]]]] = {
    "+IA": {
        "what L_ia trains": {"network": ["--ia-trains", "network"]},
        "score of Eq. 2": {"logit": ["--score", "logit"]},
        "warm-up of L_ia": {f"{n} epochs": ["--ia-start-epoch", str(n)] for n in (2, 5)},
        "BatchNorm of the masked pass": {"running": ["--masked-statistics", "running"]},
        "mask α": {value: ["--mask-scale", value] for value in ("5", "20")},
        "mask β": {value: ["--mask-threshold", value] for value in ("0.3", "0.7")},
        "scale of the mask's map": {"by range": ["--map-scale", "range"]},
        "λ1": {value: ["--lambda-ia", value] for value in ("0.1", "1.0")},
    },
    "+SA": {
        "λ2": {value: ["--lambda-sa", value] for value in ("0.2", "0.5", "1.0")},
        "α of Eq. 5": {value: ["--consistency-weight", value] for value in ("0", "2")},
        "threshold t": {value: ["--row-threshold", value] for value in ("0.1", "0.4")},
        "scale of the profiles": {"by range": ["--map-scale", "range"]},
        "aligned profiles": {"of unit length": ["--unit-profiles"]},
        "pair classifier": {
            "of the absolute difference": ["--pair-classifier", "absolute"],
            "affine": ["--pair-classifier", "affine"],
        },
        "pair classifier's width": {value: ["--hidden-dim", value] for value in ("128", "2048")},
        "pair classifier's learning rate": {"× 20": ["--pair-lr-mult", "20"]},
        "order of a pair": {"one": ["--one-order"]},
        "positive pairs": {"of any cameras": ["--any-camera"]},
    },
    "CASN": {
        "what L_ia trains, with L_sa": {"network": ["--ia-trains", "network"]},
        "λ2, with L_ia": {"0.5": ["--lambda-sa", "0.5"]},
        "pair classifier's learning rate, with L_ia": {"× 20": ["--pair-lr-mult", "20"]},
    },
}

READINGS: dict[str, list[str]] = {
    f"{score}, {trains} trained, λ1 {weight}": [
        "--score", score, "--ia-trains", trains, "--lambda-ia", weight,
    ]
    for score, weights in (("log-odds", ("0.5", "0.015")), ("above-chance", ("0.5", "0.02")))
    for trains in ("attention", "network")
    for weight in weights
}  # fmt: skip
"""Of Eq. 2, readings that a common shift of the logits does not change: options of CASN's row.

With the smaller λ1, their share of the gradient at the tapped map is about that of the probability.
"""


def name_of(family: str, losses: str) -> str:
    """Returns what the paper's Table 3 calls a row.

    Example:
        >>> name_of("IDE", "+SA"), name_of("PCB", "CASN")
        ('IDE+SA', 'CASN(PCB)')
    """
    return f"CASN({family})" if losses == "CASN" else family + losses


def all_choices() -> Iterator[tuple[str, str, str, list[str]]]:
    """Yields the losses of the row that is varied, the choice, its value and their options."""
    for losses, choices in CHOICES.items():
        for choice, values in choices.items():
            for value, options in values.items():
                yield losses, choice, value, options


def file_of(study: str, data: str, family: str) -> str:
    """Returns the name of the file that a study's runs are kept in.

    Example:
        >>> file_of("table", "ward", "IDE"), file_of("choices", "ward", "PCB")
        ('ward.jsonl', 'ward-choices-PCB.jsonl')
    """
    if study == "table":
        return f"{data}.jsonl"
    return f"{data}-{study}.jsonl" if study == "evidence" else f"{data}-{study}-{family}.jsonl"


def names_of(run: dict[str, Any]) -> set[str]:
    """Returns what --only may call a run.

    Example:
        >>> sorted(names_of({"name": "λ2", "value": "0.5"}))
        ['λ2', 'λ2: 0.5']
    """
    return {run["name"], f"{run['name']}: {run['value']}"}


def runs_of(
    study: str, data: str, backbone: str, family: str, seeds: list[int], common: list[str]
) -> list[dict[str, Any]]:
    """Returns what tells the runs of a study apart, all rows of a seed before the next seed.

    Args:
        study: "table" or "evidence" for the rows of both families, "choices" or "readings" for
            those of one.
        data: what the results are called.
        backbone: one of :data:`PROTOCOLS`.
        family: whose rows "choices" varies.
        seeds: one run of each row for each.
        common: options of protocols.py that all runs have; the row's own come before them.
    """
    rows: list[tuple[str, str, str, list[str]]] = []
    if study == "readings":
        rows += [
            ("score of Eq. 2", value, family, _lambdas("CASN") + options)
            for value, options in READINGS.items()
        ]
    elif study != "choices":
        for each in FAMILIES:
            rows += [(name_of(each, losses), "", each, _lambdas(losses)) for losses in LAMBDAS]
    else:
        rows += [
            (choice, value, family, _lambdas(losses) + options)
            for losses, choice, value, options in all_choices()
        ]
    return [
        {
            "study": study,
            "data": data,
            "name": name,
            "value": value,
            "family": of,
            "seed": seed,
            "argv": [*PROTOCOLS[backbone][of], "--seed", str(seed), *options, *common],
        }
        for seed in seeds
        for name, value, of, options in rows
    ]


def _lambdas(losses: str) -> list[str]:
    lambda_ia, lambda_sa = LAMBDAS[losses]
    return ["--lambda-ia", str(lambda_ia), "--lambda-sa", str(lambda_sa)]
