"""Checkpoints: saved whole or not at all, read without running anything, with the random state."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from casn_plugin.doors import check_count, check_kind
from casn_plugin.files import clear, replacing
from casn_plugin.objective import MetricOptions
from casn_plugin.processes import Processes
from casn_plugin.randomness import random_state, set_random_state
from casn_plugin.sampler import PairSampler

_INTERRUPTED = "model-interrupted.pth.tar"
# torchreid's own checkpoints hold their rank-1 as a NumPy scalar
_SCALARS: list[Any] = [
    type(np.float32(0)).__reduce__(np.float32(0))[0],
    np.dtype,
    type(np.dtype("float32")),
    type(np.dtype("float64")),
]


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Returns the path of a saved checkpoint, which is whole or not there.

    Raises:
        OSError: a folder that can't be made or written; what was there before is left as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     load_checkpoint(save_checkpoint({"epoch": 3}, f"{folder}/model.pth.tar"))
        {'epoch': 3}
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # so torch says that a disk is full
        raise OSError(f"{os.fspath(path)} can't be written: {error}") from error
    return Path(path)


class Checkpoints:
    """The checkpoints of one run in a folder: of the last epochs, of the best, of a signal.

    They have torchreid's names. What another run has left in the folder is not deleted.

    Args:
        folder: made when the first one is saved.
        keep: so many of the last epochs are kept, >= 1.
        processes: that all call the same methods: process 0 writes, the others wait for it, and
            fail with a RuntimeError where it does.

    Attributes:
        last: the checkpoint that this object has saved last, if any.

    Raises:
        ValueError: `keep` below 1.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, keep=2)
        ...     for epoch in (1, 2, 3):
        ...         _ = checkpoints.save({"epoch": epoch})
        ...     sorted(path.name for path in Path(folder).iterdir()), checkpoints.newest().name
        (['model.pth.tar-2', 'model.pth.tar-3'], 'model.pth.tar-3')
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 3,
        processes: Processes | None = None,
    ) -> None:
        check_count("keep", keep)
        self.folder = Path(folder)
        self.keep = keep
        self.processes = processes or Processes()
        self.last: Path | None = None
        self._saved: list[Path] = []

    def save(self, state: dict[str, Any], *, is_best: bool = False) -> Path:
        """Returns the path of the saved checkpoint of an epoch: its number is `state["epoch"]`.

        Args:
            state: what is saved.
            is_best: keep it as ``model-best.pth.tar`` too.

        Raises:
            TypeError: no dictionary, or no integer "epoch" in it.
            ValueError: a negative "epoch".
            OSError: as :func:`save_checkpoint`.
        """
        epoch = check_count("epoch of the state", check_kind("state", state, dict).get("epoch"), 0)
        path = self.folder / f"model.pth.tar-{epoch}"
        saved = [*(each for each in self._saved if each != path), path]
        with self.processes.together():
            if self.processes.leads:
                save_checkpoint(state, path)
                if is_best:
                    with replacing(self.folder / "model-best.pth.tar") as file:
                        shutil.copyfile(path, file)
                for old in saved[: -self.keep]:
                    old.unlink(missing_ok=True)
                (self.folder / _INTERRUPTED).unlink(missing_ok=True)
        self._saved, self.last = saved[-self.keep :], path
        return path

    def save_interrupted(self, state: dict[str, Any]) -> Path:
        """Returns the path of the saved checkpoint of an epoch that was not finished.

        The next epoch's takes its place.

        Raises:
            OSError: as :func:`save_checkpoint`.
        """
        path = self.folder / _INTERRUPTED
        with self.processes.together():
            if self.processes.leads:
                save_checkpoint(state, path)
        self.last = path
        return path

    def newest(self) -> Path:
        """Returns the checkpoint in the folder that was written last and is whole.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.newest_whole()[0]

    def newest_whole(self) -> tuple[Path, dict[str, Any]]:
        """Returns the path of :meth:`newest`, and what it holds.

        Raises:
            FileNotFoundError: there is none.
        """
        found = [each for each in self.folder.glob("model*.pth.tar*") if each.is_file()]
        found = [each for each in found if each.name != "model-best.pth.tar"]
        for path in sorted(found, key=lambda each: each.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(ValueError):
                return path, load_checkpoint(path)
        raise FileNotFoundError(f"there is no whole checkpoint in {self.folder}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other run out of the folder, and deletes what a killed one left half-written.

        After an exception it is said which checkpoint to go on from.

        Raises:
            RuntimeError: another run is in it.
        """
        lock = FileLock(self.folder / ".run.lock")
        try:
            with self.processes.together():
                if self.processes.leads:
                    self._enter(lock)
            yield
        except BaseException:
            if self.last is not None:
                print(
                    f'The last checkpoint is "{self.last}": go on with '
                    "engine.run(start_epoch=engine.resume(...), ...)"
                )
            raise
        finally:
            lock.release()

    def _enter(self, lock: FileLock) -> None:
        """Takes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RuntimeError(
                f"another run writes its checkpoints to {self.folder}: give this one another "
                "save_dir, or wait for the other to end"
            ) from None
        clear(self.folder)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what a checkpoint holds, on the CPU; nothing in it is run.

    Checkpoints of torchreid's own engines are read too. Every byte is compared with the file's
    checksums; files of before torch 1.6, which are no zip files, have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, a damaged one, or one that holds more than tensors and plain
            values.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {os.fspath(path)}")
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_SCALARS):
            _check_whole(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip fail in their own ways
        raise ValueError(f"{os.fspath(path)} can't be read as a checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint: it holds {type(state).__name__}, no dictionary"
        )
    return state


def checkpoint_in(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Returns a checkpoint's path and what it holds.

    Args:
        path: of it; or a folder with checkpoints, or a run's, whose newest whole one is taken.

    Raises:
        FileNotFoundError: no such file, or no whole checkpoint in the folder.
        ValueError: as :func:`load_checkpoint`.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        path, checkpoint = Checkpoints(folder).newest_whole()
        print(f'Going on from "{path}"')
        return path, checkpoint
    return path, load_checkpoint(path)


def _check_whole(file: BinaryIO) -> None:
    """Raises an error where a part of a zip file has another checksum: torch compares none."""
    is_zip = file.read(4) == b"PK\3\4"
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            # all zero: written with torch.serialization.set_crc32_options(False)
            checked = any(part.CRC for part in archive.infolist())
            damaged = archive.testzip() if checked else None
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")
    file.seek(0)


class TrainingState:
    """All that training goes on from: weights, optimizer, scheduler, scaler, pairs, random state.

    Whoever takes it over has all of it, or after an error what was there before.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        scheduler: of the learning rate, if any.
        scaler: of the gradients, if any.
        sampler: of the training images; where it is a PairSampler, the pairs go on too.
        metric: a metric loss that is trained beside the model, if any.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> training = TrainingState(net, torch.optim.SGD(net.parameters(), 0.1))
        >>> training.restore(training.state(epoch=3))
        3
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        sampler: Any = None,
        metric: MetricOptions | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.sampler = sampler if isinstance(sampler, PairSampler) else None
        self.metric = metric

    def state(self, epoch: int) -> dict[str, Any]:
        """Returns what :func:`save_checkpoint` saves, after so many epochs."""
        state = {
            "state_dict": self.model.state_dict(),
            "epoch": epoch,
            "optimizer": self.optimizer.state_dict(),
            "random_state": random_state(),
        }
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.sampler is not None:
            state["sampler_epoch"] = self.sampler.epoch
        if self.metric is not None:
            state["metric"] = self.metric.modules.state_dict()
        return state

    def restore(
        self, checkpoint: dict[str, Any], source: str | os.PathLike[str] = "checkpoint"
    ) -> int:
        """Returns how many epochs were trained, having taken over a :meth:`state`.

        Args:
            checkpoint: as :func:`load_checkpoint` gives it.
            source: the file it is of, for errors.

        Raises:
            ValueError: a checkpoint of something else, or of another model, optimizer, scheduler,
                metric loss or precision; everything is as it was then.
        """
        name = os.fspath(source)
        wanted = {"state_dict", "epoch", "optimizer", "random_state"}
        wanted |= {"scaler"} if self.scaler is not None else set()
        missing = wanted - set(checkpoint)
        if missing:
            raise ValueError(
                f"{name} is no checkpoint to go on from: it lacks {sorted(missing)}; the weights "
                "alone can be loaded with casn_plugin.checkpoint.load_weights"
            )
        try:
            with self._or_as_before():
                return self._take_over(checkpoint)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is of another model, optimizer, scheduler or precision: {error}"
            ) from error

    def _take_over(self, checkpoint: dict[str, Any]) -> int:
        """Returns how many epochs were trained, having taken over as much as fits."""
        saved, own = (
            {name for group in groups for name in group}
            for groups in (checkpoint["optimizer"]["param_groups"], self.optimizer.param_groups)
        )
        if not own - {"initial_lr"} <= saved:
            raise ValueError(f"its optimizer lacks {sorted(own - saved)}")
        scheduled = checkpoint.get("scheduler") if self.scheduler is not None else None
        if scheduled is not None:  # names that torch keeps to itself come and go
            own = {name for name in self.scheduler.state_dict() if not name.startswith("_")}
            if not own <= set(scheduled):
                raise ValueError(f"its scheduler lacks {sorted(own - set(scheduled))}")
        if self.metric is not None:
            self.metric.load(checkpoint.get("metric", {}))
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        epoch = int(checkpoint["epoch"])
        sampler_epoch = int(checkpoint.get("sampler_epoch", epoch))
        set_random_state(checkpoint["random_state"])
        if scheduled is not None:
            self.scheduler.load_state_dict(scheduled)
        if self.sampler is not None:
            self.sampler.set_epoch(sampler_epoch)
        return epoch

    @contextlib.contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Puts everything back after an exception."""
        metric = None if self.metric is None else self.metric.modules
        parts = [self.model, metric, self.optimizer, self.scheduler, self.scaler]
        before = [(each, deepcopy(each.state_dict())) for each in parts if each is not None]
        drawn = random_state()
        try:
            yield
        except BaseException:
            for each, state in before:
                each.load_state_dict(state)
            set_random_state(drawn)
            raise


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the tensors that a model took from a file: all that fit.

    Args:
        model: a CASN, or any network.
        path: a checkpoint, or a state dictionary, of the network or of its backbone alone.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a model that is no module.
        ValueError: as :func:`load_checkpoint`; or a file of another network: less than half of
            the model's tensors are in it with the same name and shape.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save(nn.Linear(2, 2).state_dict(), f"{folder}/weights.pth")
        ...     load_weights(nn.Linear(2, 2), f"{folder}/weights.pth")
        ['weight', 'bias']
    """
    own = check_kind("model", model, nn.Module).state_dict()
    state = load_checkpoint(path)
    held = state.get("state_dict", state)
    fitting = {
        str(name).removeprefix("module."): value
        for name, value in (held.items() if isinstance(held, dict) else ())
        if isinstance(value, Tensor)
        and value.layout == torch.strided  # torch 2.5 can't copy others into a weight
        and own.get(str(name).removeprefix("module."), torch.empty(0)).shape == value.shape
    }
    if len(fitting) < len(own) / 2:
        raise ValueError(
            f"{os.fspath(path)} is of another network: {len(fitting)} of {len(own)} tensors are in "
            "it with the same name and shape"
        )
    model.load_state_dict(fitting, strict=False)
    return list(fitting)
