"""What would fail after hours, found before the first step: data, labels, optimizer, test sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from casn_plugin.doors import check_kind
from casn_plugin.identities import check_labels, have_match
from casn_plugin.model import CASN
from casn_plugin.picturefiles import check_pictures
from casn_plugin.sampler import PairSampler


def check_datamanager(datamanager: Any, *, pairs: bool) -> None:
    """Finds out whether CASN can be trained with a torchreid data manager.

    Args:
        datamanager: whose train loader is looked at.
        pairs: whether it has to draw pairs.

    Raises:
        TypeError: it holds videos, or identities that are no integers.
        ValueError: it draws several views of an image, or no pairs; or identities that are no
            classes.
    """
    loader = getattr(datamanager, "train_loader", None)
    if loader is None:
        raise TypeError(
            f"expected an ImageDataManager with a train_loader, got {type(datamanager).__name__}"
        )
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
            "comes before the engine"
        )
    if hasattr(loader.dataset, "train"):
        labels = [row[1] for row in loader.dataset.train]
        check_labels("pids of the training images", labels, datamanager.num_train_pids)


def check_processes() -> None:
    """Finds out whether this process trains alone.

    Raises:
        RuntimeError: it is one of several, which would all train on the same pairs.

    Example:
        >>> check_processes()
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"expected one process that trains, got {dist.get_world_size()}: all would train on "
            "the same pairs and write the same files; for several GPUs wrap the model in "
            "nn.DataParallel"
        )


def check_optimizer(model: CASN, optimizer: torch.optim.Optimizer, *, pairs: bool) -> None:
    """Finds out whether an optimizer has all that a model is to learn.

    Args:
        model: its parameters that need gradients are looked for.
        optimizer: where they are looked for.
        pairs: whether the pair classifier is trained too.

    Raises:
        TypeError: no optimizer.
        ValueError: it lacks some.

    Example:
        >>> from torch import nn
        >>> def forward(net, imgs):
        ...     return None, net(imgs).mean((2, 3))
        >>> model = CASN(nn.Sequential(nn.Conv2d(3, 8, 3)), forward=forward)
        >>> check_optimizer(model, torch.optim.SGD(model.parameters(), 0.1), pairs=True)
    """
    check_kind("optimizer", optimizer, torch.optim.Optimizer)
    optimized = {id(each) for group in optimizer.param_groups for each in group["params"]}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in optimized
        and (pairs or not name.startswith("pair_classifier."))
    ]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the model's parameters, {missing[0]} among "
            "them: wrap the backbone first, then build the optimizer from the wrapped model; "
            "what is not to be trained has requires_grad False"
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
        self, train: Any, tests: Mapping[str, tuple[Any, Any]], counting: Mapping[str, Any]
    ) -> None:
        """Finds before the first step what would fail after the last.

        Args:
            train: the training data set, whose `train` lists (path, pid, camid); or None.
            tests: data sets of the queries and of the gallery of each test set.
            counting: what counts as a match: see :func:`check_test_set`.

        Raises:
            TypeError: identities or cameras that are no integers.
            ValueError: pictures that can't be read, or queries without a match.
        """
        rows = list(getattr(train, "train", []))
        for parts in tests.values():
            rows += [row for part in parts for row in getattr(part, "data", [])]
        new = {row[0] for row in rows if isinstance(row[0], str)} - self._paths
        check_pictures(sorted(new), progress=True)
        self._paths |= new
        for name, (query, gallery) in tests.items():
            check_test_set(name, query, gallery, **counting)
