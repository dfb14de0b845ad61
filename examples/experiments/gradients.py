"""What each loss asks of the tapped layer: the norms of their gradients, on a batch that stays."""

from typing import Any

import torch
from torch import Tensor

from casn_plugin import ImageCASNEngine, Preprocessing
from casn_plugin.hooks import frozen_batchnorm, place_of
from casn_plugin.identities import same_identity
from casn_plugin.loading import image_loader
from casn_plugin.losses import identification_attention_loss, siamese_attention_loss


def probe(data: list[Any], preprocessing: Preprocessing, pairs: int = 16) -> dict[str, Tensor]:
    """Returns a batch of pairs in rows 2i and 2i + 1, every other pair of two people.

    Args:
        data: torchreid's (path, pid, camid, ...) of the training set.
        preprocessing: of the model, with a size.
        pairs: how many, at most.

    Raises:
        ValueError: fewer than two people with two pictures.
    """
    rows: dict[int, list[Any]] = {}
    for row in data:
        rows.setdefault(row[1], []).append(row)
    people = [each for each in rows.values() if len(each) > 1][: 2 * pairs]
    if len(people) < 2:
        raise ValueError("expected two people with two pictures or more")
    chosen = []
    for number in range(min(pairs, len(people) // 2)):
        first, second = people[2 * number], people[2 * number + 1]
        other = first if number % 2 == 0 else second
        chosen += [first[0], other[-1]]  # in torchreid's order, the last one is of another camera
    batches = list(image_loader("the probe", chosen, preprocessing))
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("img", "pid")}


def gradient_norms(engine: ImageCASNEngine, batch: dict[str, Tensor]) -> dict[str, float]:
    """Returns the norms of the gradients of L_ide, λ1 L_ia and λ2 L_sa at the tapped map.

    The model learns nothing of the batch, which goes through it in training mode.
    """
    model, terms = engine.casn, {}
    imgs, pids = batch["img"].to(place_of(model).device), batch["pid"]
    was = model.training
    with torch.random.fork_rng(), frozen_batchnorm(model.train()):
        output = model(
            imgs, pids, engine.identification if engine.lambda_ia else None,
            engine.siamese if engine.lambda_sa else None,
        )  # fmt: skip
        terms["ide"] = engine.compute_loss(engine.criterion, output.logits, pids.to(imgs.device))
        if output.masked_scores is not None:
            terms["ia"] = engine.lambda_ia * identification_attention_loss(output.masked_scores)
        if output.pair_scores is not None:
            same = same_identity(pids).to(imgs.device)
            weight = engine.siamese.consistency_weight
            terms["sa"] = engine.lambda_sa * siamese_attention_loss(
                output.pair_scores, output.distances, same, consistency_weight=weight
            )
    model.train(was)
    norms = {}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, output.activations, retain_graph=True)
        norms[name] = float(gradient.norm())
    return norms
