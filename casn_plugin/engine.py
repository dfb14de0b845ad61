"""The torchreid engine that trains Eq. 6 and ranks with attention fused in.

The only module that imports torchreid, and only through the names that PyPI's torchreid 0.2.5
and GitHub's 1.4.0 both have. Importing it registers the embedded data set with torchreid.
"""

import contextlib
import os.path as osp
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import torchreid
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin.data import load_pedestrians
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evaluation import RankedLists, evaluate_rank, ranked_lists, verification_auc
from casn_plugin.explanation import ExplainedRankings
from casn_plugin.index import GalleryIndex
from casn_plugin.losses import (
    IdentificationAttentionLoss,
    SiameseAttentionLoss,
    casn_loss,
    consistency,
    identification_attention_loss,
    pair_loss,
    same_identity,
    siamese_attention_loss,
)
from casn_plugin.model import CASNOutput, as_casn, encode_batches
from casn_plugin.ranking import (
    Normalization,
    attention_distmat,
    fuse_distmats,
    pair_attention,
    same_identity_distmat,
)
from casn_plugin.sampler import PairSampler
from casn_plugin.visualization import IMAGENET_MEAN, IMAGENET_STD, denormalize, pair_mosaic

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
        siamese: the settings of L_sa, of which `threshold` holds in ranking too.
        ia_start_epoch: epochs before L_ia counts (the paper: none).
        pair_lr_mult: factor on the gradients of the pair classifier: with SGD, its learning rate
            as a multiple of the others' (but for weight decay); with Adam it does nothing.
        normalization: how the two distances are normalised before they are summed, "unit",
            "query" or "global": see :func:`casn_plugin.fuse_distmats`.
        attention_weight: weight of the attention distance in the fused ranking.
        topk: compare the attention of each query's so many nearest by features only, an
            approximation for long galleries: see :func:`casn_plugin.attention_distmat`. Only
            with normalization "unit", and without re-ranking.
        max_memory: bytes that a tile of the attention ranking may take.
        gallery_dir: keep the encodings of a gallery in a temporary folder made there instead of
            in memory: a :class:`~casn_plugin.index.GalleryIndex`, read block by block.
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
        ValueError: a train loader that draws no pairs although λ2 > 0, an unknown normalization
            or one that does not go with `topk`, a negative `logged_pairs`, or an optimizer that
            lacks the pair classifier although λ2 > 0.
    """

    train_loader: Any

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
        ia_start_epoch: int = 0,
        pair_lr_mult: float = 1.0,
        normalization: Normalization = "unit",
        attention_weight: float = 0.1,
        topk: int | None = None,
        max_memory: int | None = None,
        gallery_dir: str | None = None,
        autocast: torch.dtype | None = None,
        logged_pairs: int = 4,
    ) -> None:
        casn = as_casn(model)
        if lambda_sa and not isinstance(datamanager.train_loader.sampler, PairSampler):
            raise ValueError(
                "the train loader draws no pairs: datamanager = PairSampler.install(datamanager) "
                "comes before the engine"
            )
        if normalization not in ("unit", "query", "global"):
            raise ValueError(
                f"normalization must be 'unit', 'query' or 'global', got {normalization!r}"
            )
        if logged_pairs < 0:
            raise ValueError(f"logged_pairs must be >= 0, got {logged_pairs}")
        if topk is not None and normalization != "unit":
            raise ValueError(
                f"topk needs normalization='unit', got {normalization!r}: the other readings scale "
                "by the distances of all pairs"
            )
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
        self.ia_start_epoch = ia_start_epoch
        self.pair_lr_mult = pair_lr_mult
        self.normalization: Normalization = normalization
        self.attention_weight = attention_weight
        self.topk = topk
        self.max_memory = max_memory
        self.gallery_dir = gallery_dir
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
        self._logged: tuple[Tensor, Tensor, list[bool]] | None = None

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
                self.identification
                if self.lambda_ia and self.epoch >= self.ia_start_epoch
                else None,
                self.siamese if self.lambda_sa else None,
            )
            loss, summary = self._loss(output, pids)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.pair_lr_mult != 1:
            for parameter in self.casn.pair_classifier.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.pair_lr_mult
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._terms.update(summary)
        return summary

    def _loss(self, output: CASNOutput, pids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns L (Eq. 6) and its terms as numbers."""
        loss_ide = self.compute_loss(self.criterion, output.logits, pids)
        summary = {
            "loss_ide": loss_ide.item(),
            "acc": torchreid.metrics.accuracy(output.logits, pids)[0].item(),
        }
        loss_ia = loss_sa = loss_ide.new_zeros(())
        if output.masked_scores is not None:
            loss_ia = identification_attention_loss(output.masked_scores)
            summary["loss_ia"] = loss_ia.item()
        if output.pair_scores is not None and output.distances is not None:
            same = same_identity(pids)
            loss_sa = siamese_attention_loss(
                output.pair_scores,
                output.distances,
                same,
                attention_weight=self.siamese.attention_weight,
            )
            rows = same.repeat_interleave(len(output.pair_scores) // len(same))
            with torch.no_grad():
                summary["loss_sa"] = loss_sa.item()
                summary["loss_bce"] = pair_loss(output.pair_scores, rows).item()
                summary["attention_distance"] = consistency(output.distances, same).item()
                hits = output.pair_scores.argmax(1).bool() == rows
                summary["pair_acc"] = 100 * hits.float().mean().item()
        loss = casn_loss(
            loss_ide, loss_ia, loss_sa, lambda_ia=self.lambda_ia, lambda_sa=self.lambda_sa
        )
        return loss, {"loss": loss.item(), **summary}

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Returns the rank-1 of the fused ranking on the last target data set.

        Evaluation leaves the random state as found, so how often it is done changes no training.
        """
        self.results = {}
        self.ranked = {}
        folder: Any = contextlib.nullcontext()
        if self.gallery_dir is not None:
            Path(self.gallery_dir).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self.gallery_dir)
        with _preserved_random_state(), folder as self._folder:
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
        if rerank and self.topk is not None:
            raise ValueError("re-ranking needs the distances of all pairs: topk must be None")
        query, q_pids, q_camids = self._encode(query_loader, "query")
        gallery, g_pids, g_camids = (
            self._encode(gallery_loader, "gallery")
            if self._folder is None
            else self._encode_to_disk(gallery_loader)
        )
        print(f"Computing distance matrices with metric={dist_metric} ...")
        kwargs: dict[str, Any] = {
            "dist_metric": dist_metric,
            "normalize_feature": normalize_feature,
        }
        distmats = self._distmats(query, gallery, **kwargs)
        if rerank:
            print("Applying person re-ranking ...")
            distmats = self._rerank(distmats, query, gallery, **kwargs)

        print("Computing CMC and mAP ...")
        results: dict[str, Any] = {}
        ids = q_pids, g_pids, q_camids, g_camids
        for name, distmat in distmats.items():
            if use_metric_cuhk03:
                cmc, mean_ap = torchreid.metrics.evaluate_rank(
                    distmat.numpy(), *ids, use_metric_cuhk03=True
                )
                results[name] = {"mAP": float(mean_ap), "cmc": cmc.tolist()}
            else:
                found = evaluate_rank(distmat, *ids)
                results[name] = {
                    "mAP": found.mean_ap, "mINP": found.mean_inp, "cmc": found.cmc.tolist()
                }  # fmt: skip
        same = torch.from_numpy(q_pids[:, None] == g_pids[None])
        counted = ~(same & torch.from_numpy(q_camids[:, None] == g_camids[None]))
        scores = same_identity_distmat(self.model, query, gallery, max_memory=self.max_memory)
        results["auc"] = verification_auc(scores[counted][None], same[counted][None])
        self.results[dataset_name] = results
        self.ranked[dataset_name] = ranked_lists(distmats["features"], distmats["fused"], *ids)
        self._report(dataset_name, results, ranks)
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

    def _encode(
        self, loader: DataLoader[Any], name: str
    ) -> tuple[Encoding, np.ndarray, np.ndarray]:
        """Returns the encodings of a loader's images on the CPU, their pids and camids."""
        batches = tqdm(loader, desc=f"Encoding {name}", leave=False, disable=None)
        found = encode_batches(self.casn, map(self.parse_data_for_eval, batches))
        rows, dim = found[0].features.shape
        print(f"Done, encoded {rows} {name} images, {dim} features each")
        return found

    def _encode_to_disk(
        self, loader: DataLoader[Any]
    ) -> tuple[GalleryIndex, np.ndarray, np.ndarray]:
        """Returns the encodings of a gallery in the temporary folder, their pids and camids."""
        index = GalleryIndex.create(tempfile.mkdtemp(dir=self._folder), self.casn)
        index.extend(self.casn, loader, progress=True)
        print(f"Done, encoded {len(index)} gallery images to {index.folder}")
        return index, index.pids, index.camids

    def _distmats(
        self, query: Encoding, gallery: Encodings, *, dist_metric: str, normalize_feature: bool
    ) -> dict[str, Tensor]:
        """Returns the (Q, G) matrices of features alone, attention alone and both fused.

        The features' own is torchreid's, squared where the metric is "euclidean". What is fused
        is the l2 distance, of unit-length features where the normalization is "unit".
        """

        def of_features(normalize: bool) -> Tensor:
            qf, gf = query.features, gallery_features
            if normalize:
                qf, gf = F.normalize(qf, dim=1), F.normalize(gf, dim=1)
            distmat: Tensor = torchreid.metrics.compute_distance_matrix(qf, gf, dist_metric)
            return distmat

        unit = self.normalization == "unit"
        gallery_features = gallery.features_of(slice(0, len(gallery)))
        features = of_features(normalize_feature)
        attention = attention_distmat(
            self.model,
            query,
            gallery,
            threshold=self.siamese.threshold,
            unit=unit,
            topk=self.topk,
            max_memory=self.max_memory,
            progress=True,
        )
        to_fuse = of_features(normalize_feature or unit)
        if dist_metric == "euclidean":
            to_fuse = to_fuse.clamp(min=0).sqrt()
        fused = fuse_distmats(
            to_fuse,
            attention,
            normalization=self.normalization,
            attention_weight=self.attention_weight,
        )
        return {"features": features, "attention": attention, "fused": fused}

    def _rerank(
        self, distmats: dict[str, Tensor], query: Encoding, gallery: Encodings, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns the matrices re-ranked (Zhong et al., CVPR 2017), each among its own kind.

        What is fused is normalised over queries and gallery together: re-ranking compares
        distances of all three matrices.
        """
        num_q = len(query)
        images = Encoding.cat([query, gallery[: len(gallery)]])
        every = self._distmats(images, images, **kwargs)
        reranked = {}
        for name in distmats:
            square = (every[name] + every[name].T) / 2
            reranked[name] = torch.from_numpy(
                torchreid.utils.re_ranking(
                    square[:num_q, num_q:].numpy(),
                    square[:num_q, :num_q].numpy(),
                    square[num_q:, num_q:].numpy(),
                )
            )
        return reranked

    def _report(self, dataset_name: str, results: dict[str, Any], ranks: Sequence[int]) -> None:
        """Prints the three rankings side by side and logs them."""
        rankings = ("features", "attention", "fused")
        print("** Results **")
        print("{:<9}".format("") + "".join(f"{name:>11}" for name in rankings))
        print(
            "{:<9}".format("mAP") + "".join(f"{results[name]['mAP']:>11.1%}" for name in rankings)
        )
        if "mINP" in results["fused"]:
            shares = [results[name]["mINP"] for name in rankings]
            print(f"{'mINP':<9}" + "".join(f"{share:>11.1%}" for share in shares))
        for rank in ranks:
            if rank <= len(results["fused"]["cmc"]):
                shares = [results[name]["cmc"][rank - 1] for name in rankings]
                print(f"{f'Rank-{rank}':<9}" + "".join(f"{share:>11.1%}" for share in shares))
        print(f"Pair classifier: AUC {results['auc']:.3f} (0.5 is chance)")
        if self.writer is not None:
            for name in rankings:
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
        mean, std = self._colours()
        return ExplainedRankings(
            self.casn,
            *self._test_data(name),
            self.ranked[name],
            topk=topk,
            mean=mean,
            std=std,
            threshold=self.siamese.threshold,
        )

    def _test_data(self, name: str) -> tuple[Any, Any]:
        """Returns the queries and the gallery of a target, as data sets."""
        query, gallery = (self.test_loader[name][part].dataset for part in ("query", "gallery"))
        return query, gallery

    def _colours(self) -> tuple[Sequence[float], Sequence[float]]:
        """Returns mean and std with which the data manager normalises."""
        prepared = getattr(self.datamanager, "transform_te", None)
        for transform in reversed(getattr(prepared, "transforms", [prepared])):
            if hasattr(transform, "mean") and hasattr(transform, "std"):
                return transform.mean, transform.std
        return IMAGENET_MEAN, IMAGENET_STD

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
            pairs = _fixed_pairs(query.data, gallery.data, self.logged_pairs)
            items = [(query[i], gallery[j]) for i, j in pairs]
            self._logged = (
                torch.stack([first["img"] for first, _ in items]),
                torch.stack([second["img"] for _, second in items]),
                [bool(first["pid"] == second["pid"]) for first, second in items],
            )
        first, second, same = self._logged
        maps = pair_attention(
            self.casn,
            self.casn.encode(first.to(self._device)),
            self.casn.encode(second.to(self._device)),
        )
        colours = self._colours()
        mosaic = pair_mosaic(
            denormalize(first, *colours), denormalize(second, *colours), *maps, same
        )
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
            "random_state": _random_state(),
            "history": self.history,
        }
        sampler = self.datamanager.train_loader.sampler
        if isinstance(sampler, PairSampler):
            state["sampler_epoch"] = sampler.epoch
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        torchreid.utils.save_checkpoint(state, osp.join(save_dir, "model"), is_best=is_best)

    def resume(self, fpath: str) -> int:
        """Returns the epoch to start from, having loaded a checkpoint of :meth:`save_model`.

        ``engine.run(start_epoch=engine.resume(fpath), ...)`` trains on as if never interrupted.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a checkpoint of another engine or another model.
        """
        checkpoint = torchreid.utils.load_checkpoint(fpath)
        wanted = {"state_dict", "epoch", "optimizer", "scaler", "random_state", "history"}
        missing = wanted - set(checkpoint)
        if missing:
            raise ValueError(
                f"{fpath} is no checkpoint of ImageCASNEngine: it lacks {sorted(missing)}; the "
                "weights alone can be loaded with torchreid.utils.load_pretrained_weights"
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
        _set_random_state(checkpoint["random_state"])
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


def _fixed_pairs(
    query: Sequence[Any], gallery: Sequence[Any], number: int
) -> list[tuple[int, int]]:
    """Returns rows of query and gallery, the same at every call.

    In turn a pair of one identity, seen by two cameras, and a pair of two identities; of the
    other kind where there is none.

    Args:
        query: tuples of (path, pid, camid, ...).
        gallery: likewise.
        number: pairs to return; queries repeat where there are fewer.
    """
    rng = np.random.default_rng(0)
    pids = np.array([row[1] for row in gallery])
    camids = np.array([row[2] for row in gallery])
    one_each = {row[1]: i for i, row in enumerate(query)}
    queries = rng.permutation(list(one_each.values())).tolist()
    pairs = []
    for i in range(number):
        row = queries[i % len(queries)]
        pid, camid = query[row][1:3]
        same = np.flatnonzero((pids == pid) & (camids != camid))
        different = np.flatnonzero(pids != pid)
        wanted, other = (different, same) if i % 2 else (same, different)
        rows = wanted if len(wanted) else other if len(other) else np.arange(len(pids))
        pairs.append((row, int(rng.choice(rows))))
    return pairs


def _random_state() -> dict[str, Any]:
    """Returns the state of every generator that training draws from, safe to load."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(
        ("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached)
    )
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


@contextlib.contextmanager
def _preserved_random_state() -> Iterator[None]:
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)
