"""How well a trained model ranks, how good its attention is, and how it may be fused otherwise."""

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scaling import SiameseByRange, distmat_by_range, profiles_by_range
from torch import Tensor
from torch.utils.data import DataLoader

from casn_plugin import CASN, Encoding, ImageCASNEngine, RankingOptions, fuse_distmats
from casn_plugin.attention import align_profiles, grad_cam, row_profiles
from casn_plugin.evaluation import evaluate_rank, verification_auc
from casn_plugin.hooks import place_of
from casn_plugin.loading import encode_loader
from casn_plugin.pedestrians import mask_path
from casn_plugin.quality import attention_consistency, attention_quality
from casn_plugin.ranking import Normalization, fused_distmats, pair_attention, same_identity_logits
from casn_plugin.scores import identity_scores

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
RANKS = (1, 5, 10, 20)
READINGS: tuple[Normalization, ...] = ("unit", "query", "global")


def measure(engine: ImageCASNEngine, name: str) -> dict[str, Any]:
    """Returns how well a trained model ranks a data set, and how good its attention is.

    "features", "attention" and "fused" are what ``engine.test()`` gives; "fusion" holds rank-1
    and mAP of other readings of "normalized" and other weights, of the same encodings;
    "robustness" the AP of every query as it is. With a shortlist there are neither the readings
    that need all pairs nor distances of all pairs.
    """
    model = engine.casn
    loaders = engine.test_loader[name]
    query, *query_ids = encode_loader(model, loaders["query"])
    gallery, *gallery_ids = encode_loader(model, loaders["gallery"])
    ids = query_ids[0], gallery_ids[0], query_ids[1], gallery_ids[1]
    same = torch.from_numpy(ids[0][:, None] == ids[1])
    counted = ~(same & torch.from_numpy(ids[2][:, None] == ids[3]))

    readings = READINGS if engine.ranking.shortlist is None else READINGS[:1]
    pairs = {reading: distances(engine, query, gallery, reading) for reading in readings}
    fusion = {
        reading: {
            weight: ranking(
                fuse_distmats(*both, normalization=reading, attention_weight=weight), ids
            )
            for weight in sorted({*WEIGHTS, engine.ranking.attention_weight})
        }
        for reading, both in pairs.items()
    }
    scores = same_identity_logits(model, query, gallery)
    size = engine.datamanager.height, engine.datamanager.width
    masks = [masks_of(loaders[part].dataset, size) for part in ("query", "gallery")]
    consistency = {}
    if "query" in pairs:
        consistency = vars(attention_consistency(pairs["query"][1][counted], same[counted]))
    return {
        "features": ranking(torch.cdist(query.features, gallery.features), ids),
        "attention": ranking(pairs[engine.ranking.normalization][1], ids),
        "fused": fusion[engine.ranking.normalization][engine.ranking.attention_weight],
        "auc": verification_auc(scores[counted][None], same[counted][None]),
        "feature_auc": verification_auc(-pairs["unit"][0][counted][None], same[counted][None]),
        "fusion": {
            reading: {str(weight): [of["rank1"], of["mAP"]] for weight, of in by_weight.items()}
            for reading, by_weight in fusion.items()
        },
        "quality": {
            "identification": identification_quality(engine, loaders, masks, same, counted),
            "siamese": siamese_quality(engine, masks, query, gallery, same & counted) | consistency,
        },
        "robustness": {"none": by_query(engine, pairs["unit"], ids)},
    }


def distances(
    engine: ImageCASNEngine, query: Encoding, gallery: Encoding, reading: Normalization
) -> tuple[Tensor, Tensor]:
    """Returns the distances of features and of attention as one reading of "normalized" has them.

    They are those of the package's ranking, but for maps that are scaled by their range.
    """
    options = RankingOptions(reading, shortlist=engine.ranking.shortlist)
    row_threshold = engine.siamese.row_threshold
    features, attention, _ = fused_distmats(
        engine.casn, query, gallery, row_threshold=row_threshold, options=options
    )
    if isinstance(engine.siamese, SiameseByRange):
        attention = distmat_by_range(
            engine.casn, query, gallery, row_threshold=row_threshold, unit=reading == "unit"
        )
    return features, attention


def by_query(
    engine: ImageCASNEngine, pairs: tuple[Tensor, Tensor], ids: tuple[np.ndarray, ...]
) -> dict[str, Any]:
    """Returns rank-1 and the AP of every query, by features of unit length and fused.

    Args:
        engine: whose weight of the attention is taken.
        pairs: what :func:`distances` returns of the reading "unit".
        ids: pids of query and gallery, camids of both.
    """
    weight = engine.ranking.attention_weight
    fused = fuse_distmats(*pairs, normalization="unit", attention_weight=weight)
    found = {}
    for kind, distmat in (("features", pairs[0]), ("fused", fused)):
        evaluation = evaluate_rank(distmat, *ids)
        ap = [round(float(each), 3) for each in evaluation.ap]
        found[kind] = {"rank1": float(evaluation.cmc[0]), "ap": ap}
    return found


def ranking(distmat: Tensor, ids: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """Returns mAP, mINP and some ranks of the CMC, as shares."""
    found = evaluate_rank(distmat, *ids)
    cmc = {f"rank{rank}": float(found.cmc[rank - 1]) for rank in RANKS if rank <= len(found.cmc)}
    return {"mAP": found.mean_ap, "mINP": found.mean_inp, **cmc}


def masks_of(dataset: Any, size: tuple[int, int]) -> Tensor | None:
    """Returns the person masks of a torchreid data set in (0, 1), or None where there are none.

    Beside the folder that torchreid reads as "market1501", they are expected in
    masks/<folder of the picture>/<its name>.png.
    """
    masks = []
    for img_path, *_ in dataset.data:
        path = Path(img_path)
        beside = path.parents[3] / "masks" / path.parent.name / f"{path.stem}.png"
        own = beside if "market1501" in path.parts else Path(mask_path(img_path))
        mask = cv2.imread(str(own), cv2.IMREAD_GRAYSCALE) if own.is_file() else None
        if mask is None:
            return None
        masks.append(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(masks)) / 255


def identification_quality(
    engine: ImageCASNEngine,
    loaders: dict[str, DataLoader[Any]],
    masks: list[Tensor | None],
    same: Tensor,
    counted: Tensor,
) -> dict[str, Any]:
    """Returns the quality of the Grad-CAM maps of each image's highest scoring identity.

    The people of the test set are none that the classifier knows: it is the one most alike.
    """
    maps = [class_maps(engine.casn, loaders[part]) for part in ("query", "gallery")]
    profiles = profiles_by_range if isinstance(engine.siamese, SiameseByRange) else row_profiles
    first, second = (align_profiles(profiles(each), engine.siamese.row_threshold) for each in maps)
    found = vars(attention_consistency(torch.cdist(first, second)[counted], same[counted]))
    if masks[0] is None or masks[1] is None:
        return found
    return quality(torch.cat(maps), torch.cat([masks[0], masks[1]]), engine) | found


def class_maps(model: CASN, loader: DataLoader[Any]) -> Tensor:
    """Returns the Grad-CAM maps of the highest scoring identity, with BatchNorm in eval mode."""
    model, maps = copy.deepcopy(model).requires_grad_(False).eval(), []
    model.training = model.backbone.training = True  # so that logits are given
    device = place_of(model).device
    for batch in loader:
        output = model(batch["img"].to(device))
        logits = output.logits if isinstance(output.logits, Tensor) else sum(output.logits)
        scores = identity_scores(output.logits, logits.argmax(1))
        maps.append(grad_cam(scores, output.activations, create_graph=False).detach().cpu())
    return torch.cat(maps)


def siamese_quality(
    engine: ImageCASNEngine,
    masks: list[Tensor | None],
    query: Encoding,
    gallery: Encoding,
    positive: Tensor,
) -> dict[str, Any]:
    """Returns the quality of the maps of each query and one random match of another camera."""
    if masks[0] is None or masks[1] is None:
        return {}
    rows = positive.any(1).nonzero()[:, 0]
    chance = torch.rand(positive.shape, generator=torch.Generator().manual_seed(0))
    matches = chance.masked_fill(~positive, -1).argmax(1)[rows]
    maps = pair_attention(engine.casn, query[rows], gallery[matches])
    return quality(torch.cat(maps).cpu(), torch.cat([masks[0][rows], masks[1][matches]]), engine)


def quality(maps: Tensor, masks: Tensor, engine: ImageCASNEngine) -> dict[str, float]:
    """Returns the means of attention_quality over images, and the share of blank maps."""
    found = attention_quality(maps, masks, row_threshold=engine.siamese.row_threshold)
    means = {name: float(values.nanmean()) for name, values in vars(found).items()}
    return means | {"blank": float((maps.amax((1, 2)) <= 0).float().mean())}
