"""CASN for person re-identification: losses, attention and attention-fused ranking.

Re-Identification with Consistent Attentive Siamese Networks (Zheng, Karanam, Wu and Radke,
CVPR 2019), as a plugin for torchreid and for any other training loop.
"""

from typing import TYPE_CHECKING, Any

from casn_plugin.attention import grad_cam
from casn_plugin.batch_pairs import BatchPairs
from casn_plugin.calibration import calibrate
from casn_plugin.encoding import Encoding
from casn_plugin.evidence import Evidence, PairClassifier, Similarity
from casn_plugin.explanation import explain_pair, explain_ranking
from casn_plugin.losses import IdentificationAttentionLoss
from casn_plugin.model import CASN, CASNOutput
from casn_plugin.objective import MetricOptions
from casn_plugin.preprocessing import Preprocessing
from casn_plugin.ranking import (
    Compute,
    EncodedAgain,
    GalleryIndex,
    RankingOptions,
    Reciprocity,
    attention_distmat,
    fuse_distmats,
    rank_gallery,
    rerank,
    rerank_neighbours,
)
from casn_plugin.sampler import PairSampler
from casn_plugin.siamese import SiameseAttentionLoss
from casn_plugin.tables import feature_table, ranking_table

if TYPE_CHECKING:
    from casn_plugin.engine import ImageCASNEngine as ImageCASNEngine

__version__ = "0.1.0"
__all__ = [
    "CASN",
    "BatchPairs",
    "CASNOutput",
    "Compute",
    "EncodedAgain",
    "Encoding",
    "Evidence",
    "GalleryIndex",
    "IdentificationAttentionLoss",
    "ImageCASNEngine",
    "MetricOptions",
    "PairClassifier",
    "PairSampler",
    "Preprocessing",
    "RankingOptions",
    "Reciprocity",
    "SiameseAttentionLoss",
    "Similarity",
    "attention_distmat",
    "calibrate",
    "explain_pair",
    "explain_ranking",
    "feature_table",
    "fuse_distmats",
    "grad_cam",
    "rank_gallery",
    "ranking_table",
    "rerank",
    "rerank_neighbours",
]


def __getattr__(name: str) -> Any:
    """Returns the engine, which alone needs torchreid, when it is first asked for."""
    if name == "ImageCASNEngine":
        from casn_plugin.engine import ImageCASNEngine

        return ImageCASNEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
