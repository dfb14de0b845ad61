"""One optimisation step of several processes, and of a batch that is worked on in several parts."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from casn_plugin.batchnorm import shared_batchnorm
from casn_plugin.doors import check_count
from casn_plugin.encoding import Encoding
from casn_plugin.identities import same_identity
from casn_plugin.loading import encode_loader
from casn_plugin.model import CASN
from casn_plugin.processes import Processes
from casn_plugin.randomness import random_state
from casn_plugin.ranking import Compute, GalleryIndex
from casn_plugin.ranking.filling import share
from casn_plugin.retrieval import LabelledEncodings

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""Gives the loss of a model, of images, pids and what else is known of them, and its terms without
a graph: means over the images it is given. Attention distances are multiplied by its keyword
`balance`, where that is no None."""


class WholeBatch:
    """The loss of a batch that lies in several processes, or goes through a network in parts.

    Gradients, summed over the parts and averaged over the processes, are those of the whole
    batch in one: parts count by their images, attention distances by the positive pairs of all.
    Only what a network makes of images together tells a difference: BatchNorm, which is computed
    over all processes where that is asked for, but in each part by itself.

    In several processes ``DistributedDataParallel`` holds the model and the whole loss, so that
    it sees one forward pass and one backward pass, whatever is differentiated within.

    Args:
        model: a CASN, or one in PyTorch's wrappers. A DistributedDataParallel or DataParallel
            around it is used alone, and replaced where there are several processes.
        loss: of a part of a batch.
        processes: that work on a batch.
        accumulate: parts of a batch in each of them, >= 1: the memory of one is needed at a time.
        shared_statistics: let BatchNorm normalise by the images of all processes.
        pairs: rows 2i and 2i+1 are pair i, whose attention distances are averaged.
        beside: other modules that are trained, such as a loss with parameters of its own.

    Attributes:
        model: what is trained, without these two where they are not used.

    Raises:
        ValueError: `accumulate` below 1.

    Example:
        >>> def loss(model, imgs, pids, *, balance):
        ...     value = model(imgs).square().mean()
        ...     return value, {"loss": value.detach()}
        >>> whole = WholeBatch(nn.Linear(2, 1), loss, Processes(), accumulate=2, pairs=False)
        >>> [len(terms) for _, terms in whole.losses(torch.rand(4, 2), torch.arange(4))]
        [1, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        processes: Processes,
        *,
        accumulate: int = 1,
        shared_statistics: bool = False,
        pairs: bool = True,
        beside: Sequence[nn.Module] = (),
    ) -> None:
        self.processes = processes
        self.accumulate = check_count("accumulate", accumulate)
        self.pairs = pairs
        alone = processes.count == 1
        own = DistributedDataParallel if alone else (DistributedDataParallel, nn.DataParallel)
        while isinstance(model, own):
            model = model.module
        self.model = model
        shared = shared_statistics and not alone
        self._step = _Step(model, loss, processes if shared else Processes(), beside)
        self._parallel: DistributedDataParallel | None = None
        self._trained: list[int] = []

    def losses(
        self, imgs: Tensor, pids: Tensor, *more: Any
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yields loss and terms of each part, weighted: the sums over parts count.

        Each is to be differentiated before the next one is asked for. Terms are shares of the
        sum over all processes.

        Args:
            imgs: of this process.
            pids: their identities.
            *more: what else the loss is given of each image, such as cameras, or None.

        Raises:
            ValueError: fewer pairs than parts.
        """
        count = self.processes.count
        if count == self.accumulate == 1:
            yield self._step(imgs, pids, *more, balance=None)
            return
        ends = self._ends(len(imgs))
        parts = list(zip([0, *ends], ends, strict=False))
        own = torch.tensor([[float(end - start) for start, end in parts]], device=imgs.device)
        if self.pairs:
            found = [same_identity(pids[start:end]).sum() for start, end in parts]
            own = torch.cat([own, torch.stack(found)[None].to(own)])
        total = self.processes.add(own.sum(1))
        rows, *balances = own / total[:, None].clamp(min=1)
        step = self._in_parallel() if count > 1 else self._step
        for number, (start, end) in enumerate(parts):
            balance = balances[0][number] / rows[number] if balances else None
            with ExitStack() as stack:
                if isinstance(step, DistributedDataParallel) and number + 1 < len(parts):
                    stack.enter_context(step.no_sync())
                part = [None if each is None else each[start:end] for each in (imgs, pids, *more)]
                loss, terms = step(*part, balance=balance)
                weight = rows[number]
                yield loss * weight * count, {name: each * weight for name, each in terms.items()}

    def _ends(self, rows: int) -> list[int]:
        """Returns where each part ends: pairs stay together."""
        pairs = rows // 2
        if pairs < self.accumulate:
            raise ValueError(
                f"a batch of {rows} images has {pairs} pairs, which can't go through the network "
                f"in accumulate={self.accumulate} parts"
            )
        parts = range(1, self.accumulate)
        return [*(2 * (pairs * part // self.accumulate) for part in parts), rows]

    def _in_parallel(self) -> DistributedDataParallel:
        """Returns the step in parallel, made anew where other parameters are trained."""
        trained = [id(each) for each in self._step.parameters() if each.requires_grad]
        if self._parallel is None or trained != self._trained:
            self._parallel = None  # the hooks of the old one go
            self._parallel = DistributedDataParallel(self._step, find_unused_parameters=True)
            self._trained = trained
        return self._parallel


class _Step(nn.Module):
    """A model and its loss as one module."""

    def __init__(
        self, model: nn.Module, loss: Loss, shared: Processes, beside: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.model = model
        self.beside = nn.ModuleList(beside)
        self._loss = loss
        self._shared = shared

    def forward(self, *batch: Any, balance: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms."""
        with shared_batchnorm(self._shared):
            return self._loss(self.model, *batch, balance=balance)


def with_random_states(state: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Returns the state that a checkpoint holds, with the random states of all processes.

    Example:
        >>> list(with_random_states({"random_state": random_state()}, Processes()))
        ['random_state', 'random_states']
    """
    within = state.get("interrupted", {}).get("random_state")
    return {**state, "random_states": processes.gather([state["random_state"], within])}


def with_own_random_state(checkpoint: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Returns a checkpoint with the random state of this process where it has one, else as it is.

    A process that there was not when it was saved goes on with the state that it is in.

    Example:
        >>> saved = with_random_states({"random_state": random_state()}, Processes())
        >>> list(with_own_random_state(saved, Processes()))
        ['random_state']
    """
    within = checkpoint.get("interrupted", {}).get("random_state")
    saved = checkpoint.get("random_states", [[checkpoint.get("random_state"), within]])
    now = random_state()
    own, within = saved[processes.rank] if processes.rank < len(saved) else (now, now)
    found = {name: each for name, each in checkpoint.items() if name != "random_states"}
    if "random_state" in found:
        found["random_state"] = own
    if "interrupted" in found:
        found["interrupted"] = {**found["interrupted"], "random_state": within}
    return found


def encode_together(
    model: CASN,
    loader: DataLoader[Any],
    name: str,
    *,
    processes: Processes,
    parse: Callable[[Any], Any],
    folder: str | None = None,
) -> LabelledEncodings:
    """Returns to all processes the encodings of a loader's images, of which each encodes a share.

    Args:
        model: that encodes.
        loader: goes through a data set in its order.
        name: what the images are called where something is printed.
        processes: that share the loader's batches.
        parse: gives what :func:`casn_plugin.loading.read_batch` knows of what the loader gives.
        folder: where an index is made that keeps the encodings; None: in memory.

    Raises:
        TypeError: as :func:`casn_plugin.loading.encode_loader`.
        ValueError: likewise; several processes and a loader without batch_size.
        RuntimeError: another process has failed.
    """
    several, leads = processes.count > 1, processes.leads
    if folder is not None:
        place = processes.first(lambda: GalleryIndex.create(mkdtemp(dir=folder), model).folder)
        index = GalleryIndex(place)
        index.extend(model, loader, distributed=several, progress=leads)
        print(f"Done, encoded {len(index)} {name} images to {index.folder}")
        return LabelledEncodings(index, index.pids, index.camids)
    with processes.together():
        part = share(loader, 1, processes)[0] if several else loader
        batches = tqdm(part, f"Encoding {name}", leave=False, disable=None if leads else True)
        own = [encode_loader(model, [parse(data)]) for data in batches]
    every = [each for found in processes.gather(own) for each in found]
    encoding = Encoding.cat([each.encoding for each in every])
    pids, camids = (np.concatenate([each[column] for each in every]) for column in (1, 2))
    rows, dim = encoding.features.shape
    print(f"Done, encoded {rows} {name} images, {dim} features each")
    return LabelledEncodings(encoding, pids, camids)


@contextmanager
def shared_folder(
    parent: str | os.PathLike[str] | None, processes: Processes
) -> Iterator[str | None]:
    """Yields to all processes a new folder within another, deleted at the end; or None.

    Raises:
        OSError: the other can't be made, or not be written to.

    Example:
        >>> with shared_folder(None, Processes()) as folder:
        ...     print(folder)
        None
    """
    if parent is None:
        yield None
        return

    def make() -> str:
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            return stack.enter_context(TemporaryDirectory(dir=parent))
        except OSError as error:
            wanted = f"gallery_dir must be a folder that can be written: {error.strerror}"
            raise OSError(error.errno, wanted, os.fspath(parent)) from error

    with ExitStack() as stack:
        yield processes.first(make)
        processes.gather(None)  # before it is deleted


def ranked_by(compute: Compute, processes: Processes) -> Compute:
    """Returns with what pairs are ranked where processes share them and process 0 says how far.

    Example:
        >>> ranked_by(Compute(), Processes()).distributed
        False
    """
    several = compute.distributed or processes.count > 1
    return replace(compute, distributed=several, progress=processes.leads)


def silent_writer() -> Any:
    """Returns what takes all that a TensorBoard writer takes, and writes nothing.

    Example:
        >>> silent_writer().add_scalar("Train/loss", 1.0, 0)
    """
    return _Silent()


class _Silent:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
