"""The torchreid engine that trains Eq. 6 and ranks with attention fused in.

The only module that imports torchreid, and only through the names that PyPI's torchreid 0.2.5
and GitHub's 1.4.0 both have. Importing it registers the embedded data set with torchreid.
"""

import contextlib
import os.path as osp
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import torchreid
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin.checkpoint import (
    load_checkpoint,
    preserved_random_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from casn_plugin.data import load_pedestrians
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evaluation import (
    RANKINGS,
    RankedLists,
    evaluate_rank,
    ranked_lists,
    side_by_side,
    verification_auc,
)
from casn_plugin.explanation import ExplainedRankings, FixedPairs
from casn_plugin.loading import Encoded, Preprocessing, encode_loader
from casn_plugin.losses import IdentificationAttentionLoss, SiameseAttentionLoss
from casn_plugin.model import as_casn, loss_terms
from casn_plugin.ranking import (
    GalleryIndex,
    RankingOptions,
    fused_distmats,
    same_identity_logits,
)
from casn_plugin.sampler import PairSampler

EMBEDDED_DATASET = "casn_pedestrians"
"""The name under which torchreid finds the embedded data set."""


class ImageCASNEngine(torchreid.engine.ImageSoftmaxEngine):  # type: ignore[misc]
    """Trains L = L_ide + λ1 L_ia + λ2 L_sa (paper, Eq. 6); ranks by features and attention.

    L_ide is torchreid's own criterion. With λ1 = λ2 = 0 it trains as torchreid's
    ``ImageSoftmaxEngine`` does, step for step. Everything that ``run()`` takes does what
    torchreid documents. Evaluation prints, and logs to TensorBoard, the CMC and mAP of the
    features alone, the attention alone and both fused, and the AUC of the pair classifier; what
    counts (the returned rank-1, visrank, rerank) is the fused ranking.

    Args:
        datamanager: a ``torchreid.data.ImageDataManager`` whose train loader draws pairs: see
            :meth:`casn_plugin.PairSampler.install`.
        model: a :class:`casn_plugin.CASN`, or one in ``nn.DataParallel``.
        optimizer: made from the wrapped model, so that it holds the pair classifier too.
        scheduler: stepped once an epoch; None keeps the learning rate.
        use_gpu: use CUDA where there is one. The model is the caller's to move.
        label_smooth: label smoothing in L_ide.
        lambda_ia: λ1, weight of the identification attention loss.
        lambda_sa: λ2, weight of the Siamese attention loss.
        identification: the settings of L_ia.
        siamese: the settings of L_sa, of which `row_threshold` holds in ranking too.
        ranking: how distances of features and of attention become one ranking.
        autocast: run the forward pass under autocast in this dtype; on CUDA, float16 is trained
            with a gradient scaler.
        logged_pairs: so many fixed pairs of the first target's test images, half of them of one
            identity, are drawn with their attention to TensorBoard after every epoch; 0: none.
            Data sets that list no images in `.data`, as torchreid's do: none, and a warning.

    Attributes:
        results: of the last evaluation: data set, then "features", "attention" and "fused", each
            with "mAP" and "mINP" (shares; with `use_metric_cuhk03` no mINP) and "cmc" (a list of
            shares), and "auc" of the pair classifier.
        ranked: of the last evaluation: data set, then who came where in the fused ranking:
            see :class:`casn_plugin.evaluation.RankedLists` and :meth:`explain`.
        history: one dictionary an epoch, the mean of every loss term in it.

    Raises:
        TypeError: a model that is no CASN.
        ValueError: a train loader that draws no pairs although λ2 > 0, a negative `logged_pairs`,
            or an optimizer that lacks the pair classifier although λ2 > 0.
    """

    train_loader: Any

    # the first six arguments are torchreid's, the others the terms of Eq. 6 and how they are run
    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        use_gpu: bool = True,
        label_smooth: bool = True,
        *,
        lambda_ia: float = 0.5,
        lambda_sa: float = 0.05,
        identification: IdentificationAttentionLoss | None = None,
        siamese: SiameseAttentionLoss | None = None,
        ranking: RankingOptions | None = None,
        autocast: torch.dtype | None = None,
        logged_pairs: int = 4,
    ) -> None:
        casn = as_casn(model)
        if lambda_sa and not isinstance(datamanager.train_loader.sampler, PairSampler):
            raise ValueError(
                "the train loader draws no pairs: datamanager = PairSampler.install(datamanager) "
                "comes before the engine"
            )
        if logged_pairs < 0:
            raise ValueError(f"logged_pairs must be >= 0, got {logged_pairs}")
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if lambda_sa and any(id(p) not in optimized for p in casn.pair_classifier.parameters()):
            raise ValueError(
                "the optimizer lacks the pair classifier: wrap the backbone first, then build the "
                "optimizer from the wrapped model"
            )
        super().__init__(datamanager, model, optimizer, scheduler, use_gpu, label_smooth)
        self.casn = casn
        self.lambda_ia = lambda_ia
        self.lambda_sa = lambda_sa
        self.identification = identification or IdentificationAttentionLoss()
        self.siamese = siamese or SiameseAttentionLoss()
        self.identification.to(self._device)
        self.ranking = ranking or RankingOptions()
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler(
            self._device.type, enabled=autocast == torch.float16 and self.use_gpu
        )
        self.logged_pairs = logged_pairs
        self.results: dict[str, dict[str, Any]] = {}
        self.ranked: dict[str, RankedLists] = {}
        self.history: list[dict[str, float]] = []
        self._terms = torchreid.utils.MetricMeter()
        self._folder: str | None = None
        self._logged: FixedPairs | None = None

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if self.use_gpu else "cpu")

    def train(
        self,
        print_freq: int = 10,
        fixbase_epoch: int = 0,
        open_layers: str | Sequence[str] | None = None,
    ) -> None:
        """Trains one epoch, with a progress bar on a terminal."""
        loader = self.train_loader
        self._terms = torchreid.utils.MetricMeter()
        self.train_loader = tqdm(
            loader, desc=f"Epoch {self.epoch + 1}/{self.max_epoch}", unit="batch", leave=False,
            disable=None,
        )  # fmt: skip
        try:
            super().train(print_freq, fixbase_epoch, open_layers)
        finally:
            self.train_loader = loader
        means = {name: float(meter.avg) for name, meter in self._terms.meters.items()}
        self.history.append({"epoch": self.epoch + 1, **means})
        if self.writer is not None and self.logged_pairs:
            self._log_attention()

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Returns the loss terms of one optimisation step, as numbers.

        Raises:
            ValueError: several views of each image (``k_tfm`` > 1), which CASN has no use for.
        """
        imgs, pids = self.parse_data_for_train(data)
        if not isinstance(imgs, Tensor):
            raise ValueError("CASN trains on one view of each image: k_tfm must be 1")
        imgs, pids = imgs.to(self._device), pids.to(self._device)
        with torch.autocast(
            self._device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            output = self.model(
                imgs,
                pids,
                self.identification if self.lambda_ia else None,
                self.siamese if self.lambda_sa else None,
            )
            loss, terms = loss_terms(
                output,
                pids,
                self.compute_loss(self.criterion, output.logits, pids),
                lambda_ia=self.lambda_ia,
                lambda_sa=self.lambda_sa,
                siamese=self.siamese,
            )
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        summary = {name: term.item() for name, term in terms.items()}
        summary["acc"] = torchreid.metrics.accuracy(output.logits, pids)[0].item()
        self._terms.update(summary)
        return summary

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Returns the rank-1 of the fused ranking on the last target data set.

        Evaluation leaves the random state as found, so how often it is done changes no training.
        """
        self.results = {}
        self.ranked = {}
        folder: Any = contextlib.nullcontext()
        if self.ranking.gallery_dir is not None:
            Path(self.ranking.gallery_dir).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self.ranking.gallery_dir)
        with preserved_random_state(), folder as self._folder:
            try:
                return float(super().test(*args, **kwargs))
            finally:
                self._folder = None

    @torch.no_grad()
    def _evaluate(
        self,
        dataset_name: str = "",
        query_loader: Any = None,
        gallery_loader: Any = None,
        dist_metric: str = "euclidean",
        normalize_feature: bool = False,
        visrank: bool = False,
        visrank_topk: int = 10,
        save_dir: str = "",
        use_metric_cuhk03: bool = False,
        ranks: Sequence[int] = (1, 5, 10, 20),
        rerank: bool = False,
    ) -> tuple[float, float]:
        """Returns rank-1 and mAP of the fused ranking, as shares."""
        if rerank and self.ranking.shortlist is not None:
            raise ValueError("re-ranking needs the distances of all pairs: shortlist must be None")
        query, q_pids, q_camids = self._encode(query_loader, "query")
        gallery, g_pids, g_camids = (
            self._encode(gallery_loader, "gallery")
            if self._folder is None
            else self._encode_to_disk(gallery_loader, self._folder)
        )
        print(f"Computing distance matrices with metric={dist_metric} ...")

        def of_features(qf: Tensor, gf: Tensor, normalize: bool = normalize_feature) -> Tensor:
            if normalize:
                qf, gf = F.normalize(qf, dim=1), F.normalize(gf, dim=1)
            distmat: Tensor = torchreid.metrics.compute_distance_matrix(qf, gf, dist_metric)
            return distmat

        def to_fuse(qf: Tensor, gf: Tensor) -> Tensor:
            """Returns what is fused: l2 distances where torchreid's are squared."""
            unit = self.ranking.normalization == "unit"
            distmat = of_features(qf, gf, normalize_feature and not unit)
            return distmat.clamp(min=0).sqrt() if dist_metric == "euclidean" else distmat

        distmats = self._distmats(query, gallery, of_features, to_fuse)
        if rerank:
            print("Applying person re-ranking ...")
            # what is fused is normalised over queries and gallery together: re-ranking compares
            # distances of all three matrices
            images = Encoding.cat([query, gallery[: len(gallery)]])
            every = self._distmats(images, images, of_features, to_fuse)
            distmats = {name: _rerank(every[name], len(query)) for name in distmats}

        print("Computing CMC and mAP ...")
        ids = q_pids, g_pids, q_camids, g_camids
        results: dict[str, Any] = {
            name: _figures(distmat, ids, use_metric_cuhk03) for name, distmat in distmats.items()
        }
        same = torch.from_numpy(q_pids[:, None] == g_pids[None])
        counted = ~(same & torch.from_numpy(q_camids[:, None] == g_camids[None]))
        scores = same_identity_logits(self.model, query, gallery, compute=self.ranking.compute)
        results["auc"] = verification_auc(scores[counted][None], same[counted][None])
        self.results[dataset_name] = results
        self.ranked[dataset_name] = ranked_lists(distmats["features"], distmats["fused"], *ids)
        print(side_by_side(results, ranks))
        self._log_results(dataset_name, results)
        if visrank:
            torchreid.utils.visualize_ranked_results(
                distmats["fused"].numpy(),
                self.datamanager.fetch_test_loaders(dataset_name),
                self.datamanager.data_type,
                width=self.datamanager.width,
                height=self.datamanager.height,
                save_dir=osp.join(save_dir, "visrank_" + dataset_name),
                topk=visrank_topk,
            )
        return results["fused"]["cmc"][0], results["fused"]["mAP"]

    def _encode(self, loader: DataLoader[Any], name: str) -> Encoded:
        """Returns the encodings of a loader's images on the CPU, their pids and camids."""
        batches = tqdm(loader, desc=f"Encoding {name}", leave=False, disable=None)
        found = encode_loader(self.casn, map(self.parse_data_for_eval, batches))
        rows, dim = found.encoding.features.shape
        print(f"Done, encoded {rows} {name} images, {dim} features each")
        return found

    def _encode_to_disk(
        self, loader: DataLoader[Any], folder: str
    ) -> tuple[GalleryIndex, np.ndarray, np.ndarray]:
        """Returns the encodings of a gallery in a folder, their pids and camids."""
        index = GalleryIndex.create(tempfile.mkdtemp(dir=folder), self.casn)
        index.extend(self.casn, loader, progress=True)
        print(f"Done, encoded {len(index)} gallery images to {index.folder}")
        return index, index.pids, index.camids

    def _distmats(
        self,
        query: Encoding,
        gallery: Encodings,
        of_features: Callable[[Tensor, Tensor], Tensor],
        to_fuse: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Returns the (Q, G) matrices of features alone, attention alone and both fused.

        The features' own is torchreid's; what is fused is the l2 distance.
        """
        compute = replace(self.ranking.compute, progress=True)
        _, attention, fused = fused_distmats(
            self.model,
            query,
            gallery,
            row_threshold=self.siamese.row_threshold,
            options=replace(self.ranking, compute=compute),
            feature_distances=to_fuse,
        )
        features = of_features(query.features, gallery.features_of(slice(0, len(gallery))))
        return dict(zip(RANKINGS, (features, attention, fused), strict=True))

    def _log_results(self, dataset_name: str, results: dict[str, Any]) -> None:
        """Writes an evaluation to TensorBoard."""
        if self.writer is None:
            return
        for name in RANKINGS:
            tag = f"Test/{dataset_name}/{name}"
            self.writer.add_scalar(f"{tag}/rank1", results[name]["cmc"][0], self.epoch)
            self.writer.add_scalar(f"{tag}/mAP", results[name]["mAP"], self.epoch)
        self.writer.add_scalar(f"Test/{dataset_name}/pair_auc", results["auc"], self.epoch)

    def explain(self, dataset_name: str | None = None, *, topk: int = 5) -> ExplainedRankings:
        """Returns the ranked lists of the last evaluation, each explained when it is asked for.

        Nothing is ranked again: ``engine.explain()[0].plot()`` takes milliseconds.

        Args:
            dataset_name: one of the targets; by default the first.
            topk: matches to explain for each query, at most 10.

        Raises:
            ValueError: a data set that has not been evaluated, or topk outside [1, 10].
        """
        name = dataset_name or next(iter(self.ranked), "")
        if name not in self.ranked:
            raise ValueError(
                f"expected a data set that engine.run() or engine.test() evaluated last, one of "
                f"{list(self.ranked)}, got {dataset_name!r}"
            )
        if not 1 <= topk <= 10:
            raise ValueError(f"topk must lie in [1, 10], got {topk}")
        return ExplainedRankings(
            self.casn,
            *self._test_data(name),
            self.ranked[name],
            topk=topk,
            preprocessing=Preprocessing.of(self.datamanager),
            row_threshold=self.siamese.row_threshold,
        )

    def _test_data(self, name: str) -> tuple[Any, Any]:
        """Returns the queries and the gallery of a target, as data sets."""
        query, gallery = (self.test_loader[name][part].dataset for part in ("query", "gallery"))
        return query, gallery

    def _log_attention(self) -> None:
        """Draws the attention of the fixed pairs to TensorBoard."""
        name = next(iter(self.test_loader))
        if self._logged is None:
            query, gallery = self._test_data(name)
            if not hasattr(query, "data") or not hasattr(gallery, "data"):
                warnings.warn(
                    f"no attention is drawn to TensorBoard: the data sets of {name} list no images "
                    "in .data, as torchreid's do",
                    stacklevel=2,
                )
                self.logged_pairs = 0
                return
            self._logged = FixedPairs(query, gallery, self.logged_pairs)
        mosaic = self._logged.mosaic(self.casn, Preprocessing.of(self.datamanager))
        self.writer.add_image(f"Attention/{name}", mosaic, self.epoch + 1, dataformats="HWC")

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Saves torchreid's checkpoint, with the random state that an exact resume needs.

        It holds nothing that torch's safe loading rejects, and :meth:`resume` goes on from it.
        """
        state = {
            "state_dict": self.casn.state_dict(),
            "epoch": epoch + 1,
            "rank1": float(rank1),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": random_state(),
            "history": self.history,
        }
        sampler = self.datamanager.train_loader.sampler
        if isinstance(sampler, PairSampler):
            state["sampler_epoch"] = sampler.epoch
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        path = save_checkpoint(state, osp.join(save_dir, "model"), is_best=is_best)
        print(f'Checkpoint saved to "{path}"')

    def resume(self, fpath: str) -> int:
        """Returns the epoch to start from, having loaded a checkpoint of :meth:`save_model`.

        ``engine.run(start_epoch=engine.resume(fpath), ...)`` trains on as if never interrupted.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no checkpoint, or one of another engine or another model.
        """
        checkpoint = load_checkpoint(fpath)
        wanted = {"state_dict", "epoch", "optimizer", "scaler", "random_state", "history"}
        missing = wanted - set(checkpoint)
        if missing:
            raise ValueError(
                f"{fpath} is no checkpoint of ImageCASNEngine: it lacks {sorted(missing)}; the "
                "weights alone can be loaded with casn_plugin.checkpoint.load_weights"
            )
        saved, own = (
            {name for group in groups for name in group}
            for groups in (checkpoint["optimizer"]["param_groups"], self.optimizer.param_groups)
        )
        try:
            if not own - {"initial_lr"} <= saved:
                raise ValueError(f"its optimizer lacks {sorted(own - saved)}")
            self.scaler.load_state_dict(checkpoint["scaler"])
            self.casn.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{fpath} is of another model, optimizer or precision: {error}"
            ) from error
        if self.scheduler is not None and "scheduler" in checkpoint:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        set_random_state(checkpoint["random_state"])
        self.history = list(checkpoint["history"])
        epoch = int(checkpoint["epoch"])
        sampler = self.datamanager.train_loader.sampler
        if isinstance(sampler, PairSampler):
            sampler.set_epoch(int(checkpoint.get("sampler_epoch", epoch)))
        return epoch


class EmbeddedPedestrians(torchreid.data.ImageDataset):  # type: ignore[misc]
    """The embedded data set as torchreid takes it: ``sources="casn_pedestrians"``.

    Args:
        root: where the rendered images are kept; by default a cache folder of the user's.
        **kwargs: torchreid's own.

    Attributes:
        options: what :func:`casn_plugin.data.load_pedestrians` takes beside `root`; a subclass
            with other sizes can be registered under another name.
    """

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        train, query, gallery = load_pedestrians(root or None, **self.options)
        super().__init__(train, query, gallery, **kwargs)


torchreid.data.register_image_dataset(EMBEDDED_DATASET, EmbeddedPedestrians)


def _rerank(distmat: Tensor, queries: int) -> Tensor:
    """Returns the (Q, G) part of all images' distances, re-ranked (Zhong et al., CVPR 2017)."""
    square = (distmat + distmat.T) / 2
    parts = square[:queries, queries:], square[:queries, :queries], square[queries:, queries:]
    return torch.from_numpy(torchreid.utils.re_ranking(*(part.numpy() for part in parts)))


def _figures(distmat: Tensor, ids: tuple[np.ndarray, ...], cuhk03: bool) -> dict[str, Any]:
    """Returns the figures of merit of one ranking."""
    if cuhk03:
        cmc, mean_ap = torchreid.metrics.evaluate_rank(
            distmat.numpy(), *ids, use_metric_cuhk03=True
        )
        return {"mAP": float(mean_ap), "cmc": cmc.tolist()}
    found = evaluate_rank(distmat, *ids)
    return {"mAP": found.mean_ap, "mINP": found.mean_inp, "cmc": found.cmc.tolist()}
