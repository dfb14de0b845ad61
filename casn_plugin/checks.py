"""What would fail after hours, found before the first step: options, optimizer, data, test sets."""

import inspect
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from casn_plugin.doors import check_choice, check_count, check_kind, check_ranks, check_weight
from casn_plugin.evidence import Similarity
from casn_plugin.identities import check_labels, have_match
from casn_plugin.model import CASN
from casn_plugin.picturefiles import check_pictures
from casn_plugin.processes import Processes, started
from casn_plugin.sampler import PairSampler

_METRICS = "euclidean", "cosine"  # of torchreid's compute_distance_matrix
_SWITCHES = (
    "label_smooth", "sync_batchnorm", "test_only", "normalize_feature", "visrank",
    "use_metric_cuhk03", "rerank",
)  # fmt: skip

# whole numbers, and the least that each may be
_LEAST = {
    "logged_pairs": 0, "keep_checkpoints": 0, "max_epoch": 0, "start_epoch": 0, "print_freq": 1,
    "fixbase_epoch": 0, "start_eval": 0, "eval_freq": -1, "visrank_topk": 1,
}  # fmt: skip


def check_options(model: CASN, **options: Any) -> None:
    """Finds out whether arguments of the engine, of ``run()`` and of ``test()`` can be used.

    Args:
        model: that is trained and evaluated.
        **options: their names and values, as far as they are to be looked at.

    Raises:
        TypeError: of another kind; a scheduler that can't be stepped and saved after an epoch.
        ValueError: out of range, an unknown metric, or layers to open that the model lacks.

    Example:
        >>> def forward(net, imgs):
        ...     return None, net(imgs).mean((2, 3))
        >>> model = CASN(nn.Sequential(nn.Conv2d(3, 8, 3)), forward=forward)
        >>> check_options(model, lambda_ia=0.5, max_epoch=40, ranks=[1, 5], dist_metric="cosine")
    """
    for name, value in options.items():
        if name in _LEAST:
            check_count(name, value, _LEAST[name])
        elif name in _SWITCHES:
            check_choice(name, value, (True, False))
        elif name.startswith("lambda_"):
            check_weight(name, value)
    if options.get("autocast") not in (None, torch.float16, torch.bfloat16):
        raise TypeError(
            f"autocast must be torch.float16 or torch.bfloat16, got {options['autocast']}"
        )
    check_kind("save_dir", options.get("save_dir", ""), str, os.PathLike)
    check_choice("dist_metric", options.get("dist_metric", "euclidean"), _METRICS)
    check_ranks(options.get("ranks", (1,)))
    scheduler = options.get("scheduler")
    for method in ("step", "state_dict") if scheduler is not None else ():
        try:
            inspect.signature(getattr(scheduler, method)).bind()
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"scheduler must have a {method}() that is called after each epoch, got "
                f"{scheduler if isinstance(scheduler, type) else type(scheduler).__name__}: {error}"
            ) from error
    layers = options.get("open_layers")
    if layers is not None and options.get("fixbase_epoch"):
        there = [name for name, _ in model.named_children()]
        check_kind("open_layers", layers, str, list, tuple)
        for layer in [layers] if isinstance(layers, str) else layers:
            check_choice("each of the open_layers", layer, there)


def check_datamanager(datamanager: Any, *, pairs: bool) -> None:
    """Finds out whether CASN can be trained with a torchreid data manager.

    Args:
        datamanager: whose train loader is looked at.
        pairs: whether it has to draw pairs, as rows 2i and 2i+1 of a batch.

    Raises:
        TypeError: it holds videos, or identities that are no integers.
        ValueError: it draws several views of an image, or no pairs; or identities that are no
            classes; or there is no test set.
    """
    loader = getattr(datamanager, "train_loader", None)
    if loader is None:
        raise TypeError(
            f"expected an ImageDataManager with a train_loader, got {type(datamanager).__name__}"
        )
    if not getattr(datamanager, "test_loader", True):
        raise ValueError("expected a data manager with one test set or more, got none")
    kind = getattr(datamanager, "data_type", "image")
    if kind != "image":
        raise TypeError(
            f"expected an ImageDataManager, got {type(datamanager).__name__} with data of type "
            f"{kind!r}: CASN compares pictures, not sequences of them"
        )
    views = getattr(loader.dataset, "k_tfm", 1)
    if views != 1:
        raise ValueError(f"CASN trains on one view of each image: k_tfm must be 1, got {views}")
    if pairs and not isinstance(loader.sampler, PairSampler):
        raise ValueError(
            "the train loader draws no pairs: datamanager = PairSampler.install(datamanager) "
            "comes before the engine, or siamese=SiameseAttentionLoss(pairs=BatchPairs()) chooses "
            f"pairs inside of the batches that {type(loader.sampler).__name__} draws"
        )
    if hasattr(loader.dataset, "train"):
        labels = [row[1] for row in loader.dataset.train]
        check_labels("pids of the training images", labels, datamanager.num_train_pids)


def check_classifier(model: CASN, identities: int) -> None:
    """Finds out whether a model can tell all identities apart that it is to be trained on.

    Args:
        model: whose backbone gives the logits.
        identities: their number.

    Raises:
        ValueError: no classifier, or one of fewer classes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> check_classifier(CASN(net.append(nn.Linear(8, 5))), 5)
    """
    classes = model.reader.classes(model.backbone)
    if classes < identities:
        raise ValueError(
            f"the model's classifier must have a class for each of the {identities} identities in "
            f"the training data, got {classes} classes: build the backbone with "
            "num_classes=datamanager.num_train_pids"
        )


def check_processes(processes: Processes, datamanager: Any) -> None:
    """Finds out whether each of the processes that train draws its own share of the same data.

    Args:
        processes: that train together; all call this.
        datamanager: whose train loader is looked at.

    Raises:
        RuntimeError: processes that ``torchrun`` has started, but that have not joined; a sampler
            that draws for another number of them, or as another one; or not the same data, pairs
            and batches in each.

    Example:
        >>> from types import SimpleNamespace
        >>> check_processes(Processes(), SimpleNamespace(train_loader=[]))
    """
    loader = datamanager.train_loader
    if processes.count == 1 and started() > 1:
        raise RuntimeError(
            f"torchrun has started {started()} processes, which all would train on the same "
            "pairs: join them first, with casn_plugin.processes.launched(), before the sampler "
            "and the engine are made"
        )
    sampler = getattr(loader, "sampler", None)
    drawn = getattr(sampler, "num_replicas", 1), getattr(sampler, "rank", 0)
    wrong = drawn != (processes.count, processes.rank)
    rows = getattr(getattr(loader, "dataset", None), "train", [])
    data = repr([(os.path.basename(str(row[0])), *row[1:3]) for row in rows])
    order = [getattr(sampler, name, None) for name in ("seed", "epoch", "positive_fraction")]
    batches = getattr(loader, "batch_size", None), len(loader)
    told = processes.gather((wrong, zlib.crc32(data.encode()), order, batches))
    if any(each[0] for each in told):
        raise RuntimeError(
            f"expected a sampler that draws a share for each of {processes.count} processes, got "
            f"{type(sampler).__name__}, which draws for {drawn[0]}, as process {drawn[1]} from 0: "
            "all processes would train on the same pictures; PairSampler, made once they are "
            "joined, draws shares, and casn_plugin.shares.SharedSampler deals those of another one"
        )
    for rank, each in enumerate(told):
        if each != told[0]:
            raise RuntimeError(
                "expected the same data, seed and batches in all processes, got (checksum of the "
                f"data, seed and epoch, batches) {told[0][1:]} in process 0 and {each[1:]} in "
                f"process {rank}"
            )


def check_optimizer(
    model: CASN,
    optimizer: torch.optim.Optimizer,
    *,
    pairs: bool,
    beside: nn.Module | None = None,
) -> None:
    """Finds out whether an optimizer has all that a model is to learn.

    Args:
        model: its parameters that need gradients are looked for.
        optimizer: where they are looked for.
        pairs: whether the pair classifier is trained too.
        beside: what else is trained, such as a metric loss with parameters of its own.

    Raises:
        TypeError: no optimizer.
        ValueError: it lacks some, or pairs are to be trained and there is no pair classifier.

    Example:
        >>> def forward(net, imgs):
        ...     return None, net(imgs).mean((2, 3))
        >>> model = CASN(nn.Sequential(nn.Conv2d(3, 8, 3)), forward=forward)
        >>> check_optimizer(model, torch.optim.SGD(model.parameters(), 0.1), pairs=True)
    """
    check_kind("optimizer", optimizer, torch.optim.Optimizer)
    if pairs and isinstance(model.pair_classifier, Similarity):
        raise ValueError(
            "a Similarity has no weights to train: lambda_sa must be 0, or the model must have a "
            "PairClassifier, as CASN(backbone) has by default"
        )
    optimized = {id(each) for group in optimizer.param_groups for each in group["params"]}
    parameters = [*model.named_parameters(), *(beside.named_parameters() if beside else ())]
    missing = [
        name
        for name, parameter in parameters
        if parameter.requires_grad
        and id(parameter) not in optimized
        and (pairs or not name.startswith("pair_classifier."))
    ]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the model's parameters, {missing[0]} among "
            "them: wrap the backbone first, then build the optimizer from the wrapped model, and "
            "give it the parameters of a metric loss as another group; what is not to be trained "
            "has requires_grad False"
        )


def check_test_set(
    name: str, query: Any, gallery: Any, *, cross_camera: bool = True, junk_pids: Sequence[int] = ()
) -> None:
    """Finds out whether there is anybody to be found in a test set.

    Data sets that list no (path, pid, camid) as `data`, as torchreid's do, are not looked at.

    Args:
        name: what the test set is called in errors.
        query: the data set of the queries.
        gallery: the data set of the gallery.
        cross_camera: as in :func:`casn_plugin.evaluation.evaluate_rank`.
        junk_pids: likewise.

    Raises:
        TypeError: identities or cameras that are no integers.
        ValueError: no query has a match.
    """
    queries, galleries = (getattr(part, "data", None) for part in (query, gallery))
    if queries is None or galleries is None:
        return
    ids = [[row[column] for row in part] for column in (1, 2) for part in (queries, galleries)]
    if not have_match(*ids, cross_camera=cross_camera, junk_pids=junk_pids).any():
        raise ValueError(
            f"none of the {len(queries)} queries of {name} has a match in its gallery: expected "
            f"pictures of the same identities{' from other cameras' if cross_camera else ''}"
        )


class CheckedData:
    """What was looked at of the data already: no picture is read twice to be checked.

    Example:
        >>> CheckedData().check(None, {}, {})
    """

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def check(
        self,
        train: Any,
        tests: Mapping[str, tuple[Any, Any]],
        counting: Mapping[str, Any],
        processes: Processes | None = None,
    ) -> None:
        """Finds before the first step what would fail after the last; makes paths text.

        Args:
            train: the training data set, whose `train` lists (path, pid, camid); or None.
            tests: data sets of the queries and of the gallery of each test set.
            counting: what counts as a match: see :func:`check_test_set`.
            processes: that all call this: process 0 looks, and where it finds something, all fail.

        Raises:
            TypeError: identities or cameras that are no integers.
            ValueError: pictures that can't be read, or queries without a match.
            RuntimeError: process 0 has found something.
        """
        processes = processes or Processes()
        sets = [part for parts in tests.values() for part in parts]
        listed = [getattr(train, "train", []), *(getattr(part, "data", []) for part in sets)]
        for rows in listed:
            if isinstance(rows, list) and any(isinstance(row[0], os.PathLike) for row in rows):
                rows[:] = [(_as_text(row[0]), *row[1:]) for row in rows]
        with processes.together():
            if processes.leads:
                paths = [_as_text(row[0]) for rows in listed for row in rows]
                new = {each for each in paths if isinstance(each, str)} - self._paths
                check_pictures(sorted(new), progress=True)
                self._paths |= new
                for name, (query, gallery) in tests.items():
                    check_test_set(name, query, gallery, **counting)


def _as_text(path: Any) -> Any:
    """Returns a path as text, of which a loader makes batches; what is none as it is."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path
