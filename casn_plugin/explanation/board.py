"""What TensorBoard shows: the figures of an evaluation, and the attention of pairs every epoch."""

import warnings
from collections.abc import Mapping
from typing import Any

from casn_plugin.evidence import Evidence, evidence_of
from casn_plugin.explanation.fixed_pairs import FixedPairs
from casn_plugin.model import CASN
from casn_plugin.retrieval import RANKINGS


def log_results(writer: Any, name: str, results: Mapping[str, Any], epoch: int) -> None:
    """Writes an evaluation to TensorBoard, but for figures that have no value.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        name: of the data set.
        results: as ``engine.results[name]``.
        epoch: of the evaluation, from 0.
    """
    for ranking in RANKINGS:
        tag = f"Test/{name}/{ranking}"
        writer.add_scalar(f"{tag}/rank1", results[ranking]["cmc"][0], epoch)
        writer.add_scalar(f"{tag}/mAP", results[ranking]["mAP"], epoch)
        for figure, value in results[ranking].items():
            if figure.startswith("TAR@") and value == value:  # it is not NaN
                writer.add_scalar(f"{tag}/{figure}", value, epoch)
    if results["auc"] == results["auc"]:
        writer.add_scalar(f"Test/{name}/pair_auc", results["auc"], epoch)


class AttentionBoard:
    """The attention of some fixed pairs of a test set, drawn to TensorBoard whenever it is asked.

    Args:
        name: of the test set.
        query: the data set of its queries, which lists (path, pid, camid) as `data`; with one that
            does not, a warning is given and nothing is drawn.
        gallery: that of its gallery, likewise.
        number: pairs to draw, half of them of one identity.
    """

    def __init__(self, name: str, query: Any, gallery: Any, number: int) -> None:
        self.name = name
        self._sets = query, gallery
        self._number = number
        self._pairs: FixedPairs | None = None
        if not (hasattr(query, "data") and hasattr(gallery, "data")):
            self._number = 0
            warnings.warn(
                f"no attention is drawn to TensorBoard: the data sets of {name} list no images in "
                ".data, as torchreid's do",
                stacklevel=2,
            )

    def log(self, writer: Any, model: CASN, epoch: int) -> None:
        """Draws the attention that the model has now; the pictures are read the first time."""
        if not self._number:
            return
        if self._pairs is None:
            self._pairs = FixedPairs(*self._sets, self._number)
        mosaic = self._pairs.mosaic(model)
        similar = evidence_of(model.pair_classifier) is Evidence.SIMILARITY
        tag = f"Attention{' of similarity' if similar else ''}/{self.name}"
        writer.add_image(tag, mosaic, epoch, dataformats="HWC")
