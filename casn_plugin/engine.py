"""The torchreid engine that trains Eq. 6 and ranks with attention fused in.

The only module that imports torchreid, and only through the names that PyPI's torchreid 0.2.5
and GitHub's 1.4.0 both have. Importing it registers the embedded data set with torchreid.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casn_plugin.checkpoint import Checkpoints, TrainingState, checkpoint_in
from casn_plugin.checks import (
    CheckedData,
    check_classifier,
    check_datamanager,
    check_optimizer,
    check_options,
    check_processes,
)
from casn_plugin.doors import check_count, check_kind, check_settings
from casn_plugin.explanation import AttentionBoard, ExplainedRankings, log_results
from casn_plugin.heap import kept_heap
from casn_plugin.losses import IdentificationAttentionLoss
from casn_plugin.model import as_casn
from casn_plugin.objective import MetricOptions, loss_terms
from casn_plugin.packages import needed, warn_of_unused_gpu
from casn_plugin.parallel import (
    WholeBatch,
    encode_together,
    ranked_by,
    shared_folder,
    silent_writer,
    with_own_random_state,
    with_random_states,
)  # fmt: skip
from casn_plugin.pedestrians import load_pedestrians
from casn_plugin.preprocessing import Preprocessing
from casn_plugin.processes import Processes
from casn_plugin.randomness import preserved_random_state
from casn_plugin.ranked import RankedLists
from casn_plugin.ranking import RankingOptions, Reciprocity
from casn_plugin.retrieval import FeatureMetric, retrieve, side_by_side
from casn_plugin.siamese import SiameseAttentionLoss
from casn_plugin.training import Epoch, FiniteSteps, Interrupted, Interruption, pictures_of

with needed(quiet="Cython evaluation"):  # ours counts without it
    import torchreid

EMBEDDED_DATASET = "casn_pedestrians"
"""The name under which torchreid finds the embedded data set."""


class ImageCASNEngine(torchreid.engine.ImageSoftmaxEngine):  # type: ignore[misc]
    """Trains L = L_ide + λ1 L_ia + λ2 L_sa (paper, Eq. 6); ranks by features and attention.

    L_ide is torchreid's own criterion. With λ1 = λ2 = 0 it trains as torchreid's
    ``ImageSoftmaxEngine`` does, step for step; with `metric`, as its ``ImageTripletEngine``.
    Everything that ``run()`` takes does what torchreid documents. Evaluation prints, and logs to
    TensorBoard, the CMC and mAP of the features alone, the attention alone and both fused, and the
    AUC of the pair classifier; what counts (the returned rank-1, visrank, rerank) is the fused one.

    In several processes (:func:`casn_plugin.processes.launched`) each trains, encodes and ranks
    its share, process 0 writes and prints, and all call the same methods.

    Args:
        datamanager: a ``torchreid.data.ImageDataManager`` whose train loader draws pairs: see
            :meth:`casn_plugin.PairSampler.install`; or any, where `siamese` chooses them.
        model: a :class:`casn_plugin.CASN`, or one in ``nn.DataParallel``. In several processes
            the engine puts it into a DistributedDataParallel of its own.
        optimizer: made from the wrapped model, so that it holds the pair classifier too.
        scheduler: stepped once an epoch; None keeps the learning rate.
        use_gpu: use CUDA where there is one. The model is the caller's to move.
        label_smooth: label smoothing in L_ide.
        lambda_ia: λ1, weight of the identification attention loss L_ia.
        lambda_sa: λ2, weight of the Siamese attention loss L_sa.
        identification: its settings.
        siamese: its settings, of which `row_threshold` holds in ranking too.
        metric: a metric loss beside L_ide; its own parameters belong into the optimizer too.
        ranking: how distances of features and of attention become one ranking.
        autocast: dtype of a forward pass under autocast; float16 on CUDA with a gradient scaler.
        logged_pairs: so many fixed pairs of the first target's test images, half of them of one
            identity, are drawn with their attention to TensorBoard after every epoch; 0: none.
            Data sets that list no images in `.data`, as torchreid's do: none, and a warning.
        keep_checkpoints: so many of the last epochs' checkpoints are kept by :meth:`run`, beside
            the best; 0: none but torchreid's own, after an evaluation.
        accumulate: each batch goes through the network in so many parts, and one step is taken
            for all: the memory of a part is enough.
        sync_batchnorm: BatchNorm normalises by the images of all processes.

    Attributes:
        results: of the last evaluation: data set, then "features", "attention", "fused", "auc" and
            "evidence", as :class:`casn_plugin.retrieval.Retrieval` has them; with
            `use_metric_cuhk03`, without "mINP".
        ranked: of the last evaluation: data set, then who came where in the fused ranking:
            see :class:`casn_plugin.ranked.RankedLists` and :meth:`explain`.
        history: one dictionary an epoch, the mean of every loss term in it, and the number of
            steps "skipped" where there were such.
        best: the highest rank-1 so far, a share.

    Raises:
        TypeError: a model that is no CASN, a data manager of videos, another `autocast`.
        ValueError: a train loader that draws no pairs although λ2 > 0, or draws several views of
            an image; identities that are no classes; weights that are negative or not finite;
            negative numbers; an optimizer that lacks parameters of the model.
        RuntimeError: processes that do not each draw a share of the same data.
    """

    train_loader: Any
    writer: Any

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
        metric: MetricOptions | None = None,
        ranking: RankingOptions | None = None,
        autocast: torch.dtype | None = None,
        logged_pairs: int = 4,
        keep_checkpoints: int = 3,
        accumulate: int = 1,
        sync_batchnorm: bool = False,
    ) -> None:
        casn = as_casn(model)
        check_options(
            casn, label_smooth=label_smooth, lambda_ia=lambda_ia, lambda_sa=lambda_sa,
            autocast=autocast, logged_pairs=logged_pairs, keep_checkpoints=keep_checkpoints,
            sync_batchnorm=sync_batchnorm, scheduler=scheduler,
        )  # fmt: skip
        self.processes = Processes.found()
        identification = check_settings(
            "identification", identification, IdentificationAttentionLoss
        )
        siamese = check_settings("siamese", siamese, SiameseAttentionLoss)
        metric = MetricOptions(weight_t=0.0) if metric is None else metric
        metric = check_kind("metric", metric, MetricOptions).with_triplets(
            torchreid.losses.TripletLoss
        )
        by_rows = bool(lambda_sa) and siamese.pairs == "rows"
        check_datamanager(datamanager, pairs=by_rows)
        check_optimizer(casn, optimizer, pairs=bool(lambda_sa), beside=metric.modules)
        self._whole = WholeBatch(
            model, self._loss, self.processes, accumulate=accumulate,
            shared_statistics=sync_batchnorm, pairs=by_rows, beside=[metric.modules],
        )  # fmt: skip
        model = self._whole.model
        super().__init__(datamanager, model, optimizer, scheduler, use_gpu, label_smooth)
        warn_of_unused_gpu(use_gpu)
        self.casn = casn
        casn.preprocessing = Preprocessing.of(datamanager)
        self.lambda_ia = lambda_ia
        self.lambda_sa = lambda_sa
        self.identification = identification.to(self._device)
        self.siamese = siamese
        self.metric = metric
        metric.modules.to(self._device)
        self.ranking = check_settings("ranking", ranking, RankingOptions)
        self.autocast = autocast
        scaled = autocast == torch.float16 and self.use_gpu
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=scaled)
        self.keep_checkpoints = keep_checkpoints
        self.results: dict[str, dict[str, Any]] = {}
        self.ranked: dict[str, RankedLists] = {}
        self.history: list[dict[str, float]] = []
        self.best = -math.inf
        self.batch_idx = 0  # torchreid's, once it trains
        self._epoch: Epoch | None = None
        self._interruption = Interruption(self.processes)
        self._steps = FiniteSteps(casn, optimizer, self.scaler, interruption=self._interruption)
        self._folder: str | None = None
        self.logged_pairs = logged_pairs
        self._board: AttentionBoard | None = None
        self._checkpoints: Checkpoints | None = None
        self._resumed: dict[str, Any] = {}
        self._checked = CheckedData()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if self.use_gpu else "cpu")

    @property
    def _training(self) -> TrainingState:
        own = self.casn, self.optimizer, self.scheduler, self.scaler
        return TrainingState(*own, self.datamanager.train_loader.sampler, self.metric)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Trains and ranks as torchreid's ``run()`` does, with the same arguments.

        A line is printed an epoch; with `print_freq`, torchreid's every so many batches too.
        Before the first step the data are checked. After every epoch, before it is evaluated, a
        checkpoint is written to ``save_dir/model``: those of the last epochs and the best are
        kept. SIGINT and SIGTERM finish the step, write a checkpoint, and end the run.

        Raises:
            OSError: a `save_dir` or `gallery_dir` that can't be made or written.
            RuntimeError: another run has the same `save_dir`; or another process has failed.
            TypeError: arguments of another kind.
            ValueError: arguments out of range, fewer classes than identities, queries without a
                match, pictures that can't be read, or what torchreid rejects.
            DivergedError: several steps in a row whose losses or gradients were not finite.
            Interrupted: a signal.
        """
        bound = inspect.signature(super().run).bind(*args, **kwargs)
        bound.arguments.setdefault("print_freq", 2**31 - 1)  # never
        bound.apply_defaults()
        options = bound.arguments
        check_options(self.casn, **options)
        if options["test_only"]:
            super().run(**options)
            return
        check_processes(self.processes, self.datamanager)
        check_classifier(self.casn, self.datamanager.num_train_pids)
        with shared_folder(self.ranking.gallery_dir, self.processes):  # could be made, later on
            self._check_data(self.train_loader.dataset)
        self._checkpoints = self._checkpoints_in(options["save_dir"])
        self.writer = self.writer if self.processes.leads else silent_writer()
        heap = kept_heap() if self._device.type == "cpu" else contextlib.nullcontext()
        try:
            with self.processes.one_voice(), self._checkpoints.locked(), self._interruption, heap:
                super().run(**options)
        finally:
            self._checkpoints = None

    def train(
        self,
        print_freq: int = 10,
        fixbase_epoch: int = 0,
        open_layers: str | Sequence[str] | None = None,
    ) -> None:
        """Trains an epoch, with a progress bar on a terminal; prints a line, saves a checkpoint."""
        loader, resumed, self._resumed = self.train_loader, self._resumed, {}
        title = f"Epoch {self.epoch + 1}/{self.max_epoch}"
        self._epoch = Epoch(loader, title, interruption=self._interruption, resumed=resumed)
        self.train_loader, lr = self._epoch, self.get_current_lr()
        with self._interruption.deferred():
            try:
                super().train(print_freq, fixbase_epoch, open_layers)
            except Interrupted:
                if self._checkpoints is not None and self._interruption.signum is not None:
                    state = self._state(self.epoch, **self._epoch.interrupted_state())
                    self._checkpoints.save_interrupted(state)
                raise
            finally:
                self.train_loader = loader
            self.history.append({"epoch": self.epoch + 1, **self._epoch.means()})
            print(self._epoch.line(lr, self.max_epoch - self.epoch - 1), flush=True)
            if self._checkpoints is not None and self.keep_checkpoints:
                self._checkpoints.save(self._state(self.epoch + 1))
            self._interruption.agree()
        self._interruption.stop()  # it came in the last step, or since
        if self.writer is not None and self.logged_pairs and self.processes.leads:
            name, pairs = next(iter(self.test_loader)), self.logged_pairs
            self._board = self._board or AttentionBoard(name, *self._test_data(name), pairs)
            self._board.log(self.writer, self.casn, self.epoch + 1)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Returns the loss terms of one optimisation step, as numbers; none where it was skipped.

        A step whose loss or gradient is not finite leaves weights and statistics as they were.

        Raises:
            DivergedError: several such steps in a row.
        """
        imgs, pids = self.parse_data_for_train(data)  # pids are read, so they stay on the CPU
        imgs = imgs.to(self._device)
        where = f"epoch {self.epoch + 1}, step {self.batch_idx + 1}, "
        with self._steps.watched():
            summary = self._steps.take(
                self._whole.losses(imgs, pids, data.get("camid")),
                lambda: where + pictures_of(data.get("impath"), imgs),
            )
        if self._epoch is not None:
            self._epoch.add(summary)
        return summary or {}

    def _loss(
        self,
        model: nn.Module,
        imgs: Tensor,
        pids: Tensor,
        camids: Any = None,
        *,
        balance: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a part of a batch, and its terms, as :class:`WholeBatch` asks."""
        with torch.autocast(self._device.type, self.autocast, self.autocast is not None):
            output = model(
                imgs, pids, self.identification if self.lambda_ia else None,
                self.siamese if self.lambda_sa else None, camids,
            )  # fmt: skip
            if balance is not None:
                output = output._replace(distances=output.distances * balance)
            loss_ide = self.compute_loss(self.criterion, output.logits, pids)
            loss, terms = loss_terms(
                output, pids, loss_ide, lambda_ia=self.lambda_ia, lambda_sa=self.lambda_sa,
                siamese=self.siamese, metric=self.metric,
            )  # fmt: skip
        terms["acc"] = torchreid.metrics.accuracy(output.logits, pids.to(imgs.device))[0][0]
        return loss, terms

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Returns the rank-1 of the fused ranking on the last target data set.

        Evaluation leaves the random state as found, so how often it is done changes no training.
        """
        check_options(self.casn, **inspect.signature(super().test).bind(*args, **kwargs).arguments)
        self.results, self.ranked = {}, {}
        folder = shared_folder(self.ranking.gallery_dir, self.processes)
        with preserved_random_state(), self.processes.one_voice(), folder as self._folder:
            self._check_data(None)
            self.processes.take_over(self.casn.state_dict().values())  # statistics differ
            return float(super().test(*args, **kwargs))

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
        save_dir: str | os.PathLike[str] = "",
        use_metric_cuhk03: bool = False,
        ranks: Sequence[int] = (1, 5, 10, 20),
        rerank: bool = False,
    ) -> tuple[float, float]:
        """Returns rank-1 and mAP of the fused ranking, as shares."""
        encoded = partial(
            encode_together, self.casn, processes=self.processes, parse=self.parse_data_for_eval
        )
        query = encoded(query_loader, "query")
        gallery = encoded(gallery_loader, "gallery", folder=self._folder)
        print(f"Computing distance matrices with metric={dist_metric} ...")
        if rerank:
            print("Applying person re-ranking to features and fused ...")
        distances = partial(torchreid.metrics.compute_distance_matrix, metric=dist_metric)
        found = retrieve(
            self.model, query, gallery,
            options=replace(self.ranking, compute=ranked_by(self.ranking.compute, self.processes)),
            row_threshold=self.siamese.row_threshold,
            metric=FeatureMetric(distances, normalize_feature, dist_metric == "euclidean"),
            reciprocity=Reciprocity() if rerank else None,
        )  # fmt: skip
        results = found.results
        if use_metric_cuhk03:
            ids = query.pids, gallery.pids, query.camids, gallery.camids
            for name, distmat in found.distmats.items():
                cmc, mean_ap = torchreid.metrics.evaluate_rank(
                    distmat.numpy(), *ids, use_metric_cuhk03=True
                )
                del results[name]["mINP"]
                results[name] |= {"mAP": float(mean_ap), "cmc": cmc.tolist()}
        self.results[dataset_name] = results
        self.ranked[dataset_name] = found.ranked
        print(side_by_side(results, ranks))
        if self.writer is not None:
            log_results(self.writer, dataset_name, results, self.epoch)
        if visrank and self.processes.leads:
            torchreid.utils.visualize_ranked_results(
                found.distmats["fused"].numpy(), self.datamanager.fetch_test_loaders(dataset_name),
                self.datamanager.data_type, self.datamanager.width, self.datamanager.height,
                os.path.join(save_dir, "visrank_" + dataset_name), visrank_topk,
            )  # fmt: skip
        return results["fused"]["cmc"][0], results["fused"]["mAP"]

    def explain(self, dataset_name: str | None = None, *, topk: int = 5) -> ExplainedRankings:
        """Returns the ranked lists of the last evaluation, each explained when it is asked for.

        Nothing is ranked again: ``engine.explain()[0].plot()`` takes milliseconds.

        Args:
            dataset_name: one of the targets; by default the first.
            topk: matches to explain for each query, at most 10.

        Raises:
            TypeError: topk that is no integer.
            ValueError: a data set that has not been evaluated, or topk outside [1, 10].
        """
        name = dataset_name or next(iter(self.ranked), "")
        if name not in self.ranked:
            raise ValueError(
                f"expected a data set that engine.run() or engine.test() evaluated last, one of "
                f"{list(self.ranked)}, got {dataset_name!r}"
            )
        check_count("topk", topk, most=10)
        return ExplainedRankings(
            self.casn, *self._test_data(name), self.ranked[name], topk=topk,
            row_threshold=self.siamese.row_threshold,
        )  # fmt: skip

    def _check_data(self, train: Any) -> None:
        tests = {name: self._test_data(name) for name in self.test_loader}
        self._checked.check(train, tests, self.ranking.counting, self.processes)

    def _test_data(self, name: str) -> tuple[Any, Any]:
        """Returns the queries and the gallery of a target, as data sets."""
        query, gallery = (self.test_loader[name][part].dataset for part in ("query", "gallery"))
        return query, gallery

    def save_model(self, epoch: int, rank1: float, save_dir: Any, is_best: bool = False) -> None:
        """Saves the checkpoint of an epoch again, with its rank-1, once it was evaluated."""
        is_best, self.best = is_best or rank1 > self.best, max(self.best, rank1)
        checkpoints = self._checkpoints or self._checkpoints_in(save_dir)
        state = {**self._state(epoch + 1), "rank1": float(rank1)}
        print(f'Checkpoint saved to "{checkpoints.save(state, is_best=is_best)}"')

    def _checkpoints_in(self, save_dir: str | os.PathLike[str]) -> Checkpoints:
        folder = os.path.join(save_dir, "model")
        return Checkpoints(folder, max(self.keep_checkpoints, 1), self.processes)

    def resume(self, fpath: str | os.PathLike[str]) -> int:
        """Returns the epoch to start from, having loaded a checkpoint of this engine.

        ``engine.run(start_epoch=engine.resume(fpath), ...)`` trains on as if never interrupted,
        also from within an epoch.

        Args:
            fpath: a checkpoint; or a `save_dir`, whose newest whole checkpoint is taken.

        Raises:
            FileNotFoundError: no such file, or no whole checkpoint in the folder.
            ValueError: no checkpoint, or one of another engine or model: nothing has changed then.
        """
        path, checkpoint = self.processes.first(lambda: checkpoint_in(fpath))
        checkpoint = with_own_random_state(checkpoint, self.processes)
        own = list(checkpoint.get("history", [])), checkpoint.get("best", -math.inf)
        epoch = self._training.restore(checkpoint, path)
        (self.history, self.best), self._resumed = own, checkpoint.get("interrupted", {})
        return epoch

    def _state(self, epoch: int, **more: Any) -> dict[str, Any]:
        """Returns what a checkpoint holds after so many epochs; refuses weights that are NaN."""
        self._steps.check_weights()
        own = {**self._training.state(epoch), "history": self.history, "best": self.best}
        return with_random_states({**own, **more}, self.processes)


class EmbeddedPedestrians(torchreid.data.ImageDataset):  # type: ignore[misc]
    """The embedded data set as torchreid takes it: ``sources="casn_pedestrians"``.

    Args:
        root: where the rendered images are kept; by default a cache folder of the user's.
        **kwargs: torchreid's own.

    Attributes:
        options: what :func:`casn_plugin.pedestrians.load_pedestrians` takes beside `root`;
            a subclass with other sizes can be registered under another name.
    """

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        train, query, gallery = load_pedestrians(root or None, **self.options)
        super().__init__(train, query, gallery, **kwargs)


with contextlib.suppress(ValueError):  # it is registered already where this module is reloaded
    torchreid.data.register_image_dataset(EMBEDDED_DATASET, EmbeddedPedestrians)
