"""Attention-fused ranking of every query-gallery pair, without a backward pass per pair.

The indicator α of all pairs (Eq. 4) is one matrix product over the hidden units of the pair
classifier; the attention map of each image of each pair is ReLU(Bᵀα), a second one over the basis
that :mod:`casn_plugin.encoding` computes once per image.
"""

from casn_plugin.ranking.again import EncodedAgain
from casn_plugin.ranking.candidates import feature_candidates
from casn_plugin.ranking.compute import Compute
from casn_plugin.ranking.distances import (
    attention_distmat,
    indicator_flips,
    pair_attention,
    pair_scores,
    same_identity_logits,
)
from casn_plugin.ranking.fused import (
    Distmats,
    FeatureDistances,
    Normalization,
    RankingOptions,
    fuse_distmats,
    fused_distmats,
    l2_distances,
)
from casn_plugin.ranking.index import GalleryIndex
from casn_plugin.ranking.milvus import MilvusFeatures, other_cameras
from casn_plugin.ranking.mutual import feature_neighbourhood, fused_neighbourhood
from casn_plugin.ranking.pairs import pair_classifier_of
from casn_plugin.ranking.reranking import (
    Reciprocity,
    Reranked,
    rerank,
    rerank_neighbourhood,
    rerank_neighbours,
)
from casn_plugin.ranking.search import Ranking, SearchResult, rank_gallery

__all__ = [
    "Compute",
    "Distmats",
    "EncodedAgain",
    "FeatureDistances",
    "GalleryIndex",
    "MilvusFeatures",
    "Normalization",
    "Ranking",
    "RankingOptions",
    "Reciprocity",
    "Reranked",
    "SearchResult",
    "attention_distmat",
    "feature_candidates",
    "feature_neighbourhood",
    "fuse_distmats",
    "fused_distmats",
    "fused_neighbourhood",
    "indicator_flips",
    "l2_distances",
    "other_cameras",
    "pair_attention",
    "pair_classifier_of",
    "pair_scores",
    "rank_gallery",
    "rerank",
    "rerank_neighbourhood",
    "rerank_neighbours",
    "same_identity_logits",
]
