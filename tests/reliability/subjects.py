"""What is attacked: a small model, and a right call of each public function."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

from market import write_market

import casn_plugin
from casn_plugin import (
    CASN,
    BatchPairs,
    Encoding,
    MetricOptions,
    PairSampler,
    SiameseAttentionLoss,
    attention,
    basis,
    batch_pairs,
    encoding,
    evaluation,
    identities,
    loading,
    losses,
    preprocessing,
    quality,
    ranking,
    retrieval,
)
from casn_plugin.explanation.pictures import colour_key, overlay, pair_mosaic
from casn_plugin.ranked import ranked_lists

SIZE = (32, 16)
Case = tuple[Callable[..., Any], dict[str, Any]]
"""A function, and the arguments of a right call by name."""


class Tiny(nn.Module):
    """A backbone of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6))
        self.classifier = nn.Linear(6, 4)


def tiny_forward(backbone: Tiny, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and features."""
    features = backbone.features(imgs).relu().mean((2, 3))
    return backbone.classifier(features), features


def tiny_casn() -> CASN:
    """Returns a CASN in eval mode."""
    return CASN(Tiny(), forward=tiny_forward, input_size=SIZE, hidden_dim=4).eval()


class TinyReid(Tiny):
    """The small backbone as torchreid's are: logits in training, features in eval mode."""

    loss = "softmax"

    def forward(self, imgs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits, features or both."""
        logits, features = tiny_forward(self, imgs)
        if not self.training:
            return features
        return logits if self.loss == "softmax" else (logits, features)


def engine_of(folder: Path) -> Any:
    """Returns a small engine for people that are generated in folder/data, if need be."""
    import torchreid

    from casn_plugin import ImageCASNEngine

    if not (folder / "data").is_dir():
        write_market(folder / "data")
    with contextlib.redirect_stdout(io.StringIO()):
        data = torchreid.data.ImageDataManager(
            root=str(folder / "data"), sources="market1501", height=SIZE[0], width=SIZE[1],
            batch_size_train=4, batch_size_test=8, workers=0, use_gpu=False,
        )  # fmt: skip
    data = PairSampler.install(data)
    model = CASN(TinyReid(), input_size=SIZE, hidden_dim=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return ImageCASNEngine(data, model, optimizer, use_gpu=False, logged_pairs=2)


def cases() -> dict[str, Case]:
    """Returns a right call of each public function, by its name."""
    model = tiny_casn()
    imgs, maps, pids = torch.rand(4, 3, *SIZE), torch.rand(4, 6, 3), torch.tensor([0, 1, 2, 3])
    distmat, other = torch.rand(3, 5), torch.rand(3, 5)
    ids = {"q_pids": [1, 2, 3], "g_pids": [1, 2, 3, 1, -1], "q_camids": [0, 0, 0]}
    ids["g_camids"] = [1, 1, 1, 0, 1]
    counted = {**ids, "cross_camera": True, "junk_pids": (-1,)}
    same, scores = torch.tensor([True, False]), torch.rand(4, 4)
    maps_of = torch.rand(4, 6, 4, 2, requires_grad=True)
    features = maps_of.mean((2, 3))
    part = Encoding(torch.rand(5, 6), torch.rand(5, 6, 4, 2))
    rows = retrieval.LabelledEncodings(part, np.array([1, 1, 2, 2, 3]), np.array([0, 1, 0, 1, 0]))
    ranked = {"model": model, "query": part[:3], "gallery": part}
    loss_ia = losses.IdentificationAttentionLoss()
    loss_sa = SiameseAttentionLoss()
    picture = np.random.default_rng(0).random((2, 16, 8, 3))
    curve = {"mAP": 0.5, "cmc": [0.5, 1.0], "mINP": 0.25}
    results = {**dict.fromkeys(("features", "attention", "fused"), curve), "auc": 0.5}

    def train_ia(**given: Any) -> Any:
        net = tiny_casn().train()
        return net(given["imgs"], given["pids"], loss_ia, loss_sa)

    return {
        "grad_cam": (
            attention.grad_cam,
            {"scores": features.sum(1), "activations": maps_of, "create_graph": True},
        ),
        "indicator": (
            attention.indicator,
            {"pair_classifier": model.pair_classifier, "differences": torch.rand(2, 6)},
        ),
        "siamese_attention": (
            attention.siamese_attention,
            {"pair_classifier": model.pair_classifier, "features": features,
             "activations": maps_of},
        ),
        "split_pairs": (identities.split_pairs, {"rows": maps}),
        "scale_maps": (attention.scale_maps, {"maps": maps}),
        "soft_mask": (
            attention.soft_mask,
            {"maps": maps, "size": (12, 6), "mask_scale": 10.0, "mask_threshold": 0.5},
        ),
        "row_profiles": (attention.row_profiles, {"maps": maps}),
        "attended_span": (
            attention.attended_span, {"profiles": maps[..., 0], "row_threshold": 0.2},
        ),
        "align_profiles": (
            attention.align_profiles, {"profiles": maps[..., 0], "row_threshold": 0.2},
        ),
        "attention_distance": (
            attention.attention_distance,
            {"first": maps[..., 0], "second": maps[..., 1], "row_threshold": 0.2, "unit": True},
        ),
        "identification_loss": (
            losses.identification_loss, {"logits": scores, "pids": pids, "label_smoothing": 0.1},
        ),
        "identity_scores": (
            losses.identity_scores, {"logits": scores, "pids": pids, "score": "logit"},
        ),
        "identification_attention_loss": (
            losses.identification_attention_loss, {"masked_scores": scores[0]},
        ),
        "pair_loss": (losses.pair_loss, {"pair_scores": scores[:2, :2], "same": same}),
        "siamese_attention_loss": (
            losses.siamese_attention_loss,
            {"pair_scores": scores[:2, :2], "distances": scores[0, :2], "same": same,
             "consistency_weight": 0.2},
        ),
        "consistency": (losses.consistency, {"distances": scores[0, :2], "same": same}),
        "casn_loss": (
            losses.casn_loss,
            {"loss_ide": scores[0, 0], "loss_ia": scores[0, 1], "loss_sa": scores[0, 2],
             "lambda_ia": 0.5, "lambda_sa": 0.05},
        ),
        "IdentificationAttentionLoss": (
            losses.IdentificationAttentionLoss,
            {"score": "logit", "mask_scale": 10.0, "mask_threshold": 0.5, "fill": 0.0,
             "trains": "attention", "statistics": "batch"},
        ),
        "SiameseAttentionLoss": (
            SiameseAttentionLoss,
            {"consistency_weight": 0.2, "row_threshold": 0.2, "unit": False},
        ),
        "SiameseAttentionLoss.choose": (
            SiameseAttentionLoss(pairs=BatchPairs()).choose, {"pids": pids, "camids": pids},
        ),
        "BatchPairs": (BatchPairs, {"number": 3, "positive_fraction": 0.5, "seed": 0}),
        "BatchPairs.draw": (
            BatchPairs().draw, {"pids": [1, 1, 2, -1], "camids": [0, 1, 0, 1]},
        ),
        "check_rows": (batch_pairs.check_rows, {"pids": pids}),
        "MetricOptions": (MetricOptions, {"weight_t": 1.0, "weight_x": 1.0, "margin": 0.3}),
        "MetricOptions.loss": (
            MetricOptions(metric_loss=lambda features, pids: features.sum()).loss,
            {"features": features, "pids": pids},
        ),
        "CASN.forward": (train_ia, {"imgs": imgs, "pids": pids}),
        "CASN.encode": (model.encode, {"imgs": imgs}),
        "CASN": (
            lambda **given: CASN(Tiny(), forward=tiny_forward, **given),
            {"input_size": SIZE, "hidden_dim": 4},
        ),
        "Encoding": (Encoding, {"features": part.features, "basis": part.basis}),
        "Encoding.cat": (Encoding.cat, {"encodings": [part, part]}),
        "encode_head": (
            lambda **given: basis.encode_head(**given),
            {"features": features, "activations": maps_of, "chunk": 2},
        ),
        "part_embedding": (encoding.part_embedding, {"activations": maps_of, "parts": 2}),
        "part_scales": (encoding.part_scales, {"activations": maps_of, "parts": 2}),
        "evaluate_rank": (
            evaluation.evaluate_rank, {"distmat": distmat, **counted, "max_rank": 5},
        ),
        "ranked_lists": (
            ranked_lists,
            {"feature_distmat": distmat, "fused_distmat": other, **counted, "topk": 3},
        ),
        "verification_auc": (
            evaluation.verification_auc, {"scores": scores[0, :2], "same": same},
        ),
        "side_by_side": (retrieval.side_by_side, {"results": results, "ranks": (1, 5)}),
        "attention_quality": (
            quality.attention_quality,
            {"maps": maps, "masks": torch.rand(4, 12, 6), "pixel_threshold": 0.5,
             "row_threshold": 0.2},
        ),
        "attention_consistency": (
            quality.attention_consistency, {"distances": scores[0, :2], "same": same},
        ),
        "as_ids": (identities.as_ids, {"name": "pids", "ids": [1, 2], "length": 2}),
        "check_labels": (
            identities.check_labels, {"name": "pids", "pids": [0, 1, 1], "classes": 2},
        ),
        "same_person": (identities.same_person, {"first": 1, "second": 1}),
        "pairs_by_identity": (identities.pairs_by_identity, counted),
        "have_match": (identities.have_match, counted),
        "PairSampler": (
            lambda **given: list(casn_plugin.PairSampler(**given)),
            {"pids": [0, 0, 1, 1], "camids": [0, 1, 0, 1], "batch_size": 4,
             "positive_fraction": 0.5, "seed": 0},
        ),
        "Preprocessing": (
            preprocessing.Preprocessing,
            {"size": SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
        ),
        "Preprocessing.load": (preprocessing.Preprocessing(SIZE).load, {"image": imgs[0]}),
        "read_batch": (loading.read_batch, {"data": (imgs, pids, pids)}),
        "read_item": (loading.read_item, {"data": (imgs[0], 7, 1)}),
        "encode_images": (loading.encode_images, {"model": model, "imgs": imgs}),
        "encode_loader": (
            loading.encode_loader, {"model": model, "batches": [(imgs, pids, pids)]},
        ),
        "retrieve": (
            retrieval.retrieve,
            {"model": model, "query": rows, "gallery": rows, "row_threshold": 0.2},
        ),
        "attention_distmat": (ranking.attention_distmat, {**ranked, "row_threshold": 0.2}),
        "fuse_distmats": (
            ranking.fuse_distmats,
            {"feature_distmat": distmat, "attention_distmat": other, "normalization": "query",
             "attention_weight": 0.1},
        ),
        "rank_gallery": (
            ranking.rank_gallery,
            {**ranked, "topk": 2, "row_threshold": 0.2, "attention_weight": 0.1},
        ),
        "same_identity_logits": (ranking.same_identity_logits, ranked),
        "pair_attention": (
            ranking.pair_attention, {"model": model, "first": part, "second": part},
        ),
        "explain_pair": (
            casn_plugin.explain_pair,
            {"model": model, "first": imgs[0], "second": imgs[1], "same": True,
             "row_threshold": 0.2},
        ),
        "explain_ranking": (
            lambda **given: list(casn_plugin.explain_ranking(**given)),
            {"model": model, "query": [(imgs[0], 1, 0)],
             "gallery": [(img, 1, 1) for img in imgs], "topk": 2},
        ),
        "overlay": (
            overlay, {"pictures": picture, "maps": torch.rand(2, 4, 2), "opacity": 0.6},
        ),
        "pair_mosaic": (
            pair_mosaic,
            {"first_pictures": picture, "second_pictures": picture,
             "first_maps": torch.rand(2, 4, 2), "second_maps": torch.rand(2, 4, 2),
             "same": [True, None]},
        ),
        "colour_key": (colour_key, {"rows": 8, "columns": 96}),
    }  # fmt: skip
