"""What keeps hours of training: no step with numbers that are none, no stop that loses an epoch."""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin.doors import check_count
from casn_plugin.processes import Processes
from casn_plugin.randomness import random_state, set_random_state
from casn_plugin.sampler import PairSampler


class DivergedError(FloatingPointError):
    """Losses or gradients were no finite numbers, several steps in a row."""


class Interrupted(SystemExit):
    """A signal has ended the run after the step that it met, with a checkpoint."""


class Interruption:
    """Lets SIGINT and SIGTERM wait for the end of a step, so that nothing trained is lost.

    Outside of :meth:`deferred`, and at the second signal, the run ends at once. Signals of other
    threads than the main one are left alone.

    Args:
        processes: that train together: a signal counts once all have heard of it, so that all end
            after the same step.

    Attributes:
        signum: the signal that ends the run, or None.

    Example:
        >>> with Interruption() as interruption, interruption.deferred():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interruption.signum == signal.SIGTERM
        Stopping after this step (once more: at once) ...
        True
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.signum: int | None = None
        self.own: int | None = None
        self._deferred = False
        self._found: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> "Interruption":
        """Takes over the signals."""
        self.signum = self.own = None
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._found[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for signum, handler in self._found.items():
            signal.signal(signum, handler)
        self._found = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agree(self) -> None:
        """Lets every process know of a signal that any has got; all call it together."""
        self.signum = max(self.processes.gather(self.own or 0)) or None

    def stop(self) -> None:
        """Ends the run where all know of a signal.

        Raises:
            Interrupted: they do.
        """
        if self.signum is not None:
            raise Interrupted(128 + self.signum)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's, which ends with its loader
            return
        if not self._deferred or self.own is not None:
            raise Interrupted(128 + signum)
        self.own = signum
        if self.processes.count == 1:
            self.signum = signum
        tqdm.write("Stopping after this step (once more: at once) ...")


class FiniteSteps:
    """Optimisation steps that leave no NaN and no infinity in the weights.

    A step whose loss terms or gradients are not finite is skipped: weights, optimizer and the
    statistics of BatchNorm stay as they were before its forward pass. Processes that train
    together skip the same steps.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        scaler: of the gradients under float16, which skips steps with infinite ones by itself.
        patience: so many bad steps in a row end the training, >= 1.
        interruption: of the run: its processes are those that train together, and hear with each
            step whether a signal has come to one of them.

    Attributes:
        skipped: one sentence for each step that was skipped.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> steps = FiniteSteps(net, torch.optim.SGD(net.parameters(), 0.1))
        >>> with steps.watched():
        ...     loss = net(torch.full((4, 2), torch.nan)).sum()
        ...     steps.take([(loss, {"loss": loss.detach()})], lambda: "step 1") is None
        step 1: loss is nan, gradient is nan; the step is skipped
        True
        >>> bool(net.weight.isfinite().all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        *,
        patience: int = 5,
        interruption: Interruption | None = None,
    ) -> None:
        check_count("patience", patience)
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.patience = patience
        self.interruption = interruption or Interruption()
        self.skipped: list[str] = []
        self._in_a_row = 0
        self._before: list[tuple[Tensor, Tensor]] = []

    def check_weights(self) -> None:
        """Keeps a model from being saved whose weights are no numbers.

        Raises:
            DivergedError: a weight or statistic is NaN or infinite.
        """
        for name, value in self.model.state_dict().items():
            if not bool(value.isfinite().all()):
                raise DivergedError(f"{name} is not finite: is the learning rate too high?")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remembers the statistics that a forward pass inside of this context may move."""
        self._before = [(each, each.clone()) for each in self.model.buffers()]
        try:
            yield
        finally:
            self._before = []

    def take(
        self, losses: Iterable[tuple[Tensor, dict[str, Tensor]]], where: Callable[[], str]
    ) -> dict[str, float] | None:
        """Returns the terms as numbers, having taken a step; None where it was skipped.

        All that is read from the device is read at once.

        Args:
            losses: loss and terms of each part of the batch, which are summed: a loss has the
                graph of its forward pass in :meth:`watched`, and is differentiated before the
                next part is asked for; terms have none. They are summed over the processes too,
                losses are not.
            where: gives epoch, step and pictures, where something is printed.

        Raises:
            DivergedError: the last `patience` steps were skipped.
        """
        self.optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        for loss, part in losses:
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            terms = {name: terms[name] + each if terms else each for name, each in part.items()}
        numbers, own = self._read(terms)
        bad = _not_finite(numbers)
        if not bad:
            self._in_a_row = 0
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return {name: numbers[name] for name in terms}
        self._skip(self._said(where, own, numbers) + "; the step is skipped")
        return None

    def _read(self, terms: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Returns as numbers the terms over all processes with the gradient, and those of this."""
        processes = self.interruption.processes
        own = torch.stack([each.float() for each in terms.values()])
        read = [own]
        if processes.count > 1:
            signum = own.new_tensor([float(self.interruption.own or 0)])
            read = [processes.add(torch.cat([own, signum])), own]
        if self.scaler is None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms = [norm.float() for norm in torch._foreach_norm(gradients)] if gradients else []
            read.append(torch.stack([*norms, own.new_zeros(())]).sum()[None])
        values = torch.cat(read).tolist()
        every = dict(zip(terms, values, strict=False))
        alone = every
        if processes.count > 1:
            alone = dict(zip(terms, values[len(terms) + 1 :], strict=False))
            if values[len(terms)]:
                self.interruption.agree()
        return every | ({} if self.scaler is not None else {"gradient": values[-1]}), alone

    def _said(
        self, where: Callable[[], str], own: dict[str, float], numbers: dict[str, float]
    ) -> str:
        """Returns what is said of a bad step: by the processes whose own terms are bad, or all."""
        processes, bad = self.interruption.processes, _not_finite(numbers)
        if processes.count == 1:
            return f"{where()}: {', '.join(bad)}"
        told = processes.gather((where(), _not_finite(own)))
        shown = [rank for rank, (_, guilty) in enumerate(told) if guilty] or range(len(told))
        return "; ".join(
            f"process {rank}, {told[rank][0]}: {', '.join(told[rank][1] or bad)}" for rank in shown
        )

    def _skip(self, sentence: str) -> None:
        """Puts back what the forward pass has moved, and says so."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in self._before:
                buffer.copy_(before)
        self.skipped.append(sentence)
        tqdm.write(sentence)
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            raise DivergedError(
                f"{self._in_a_row} steps in a row had losses or gradients that are not finite, "
                f"the last one at {sentence}"
            )


def _not_finite(numbers: dict[str, float]) -> list[str]:
    """Returns what is not finite, in words."""
    return [f"{name} is {each}" for name, each in numbers.items() if not math.isfinite(each)]


# the terms in an epoch's line, and what they are called there
_SHOWN = {"loss": "L", "loss_ide": "L_ide", "loss_t": "L_t", "loss_ia": "L_ia", "loss_sa": "L_sa"}


class Epoch:
    """The batches of one epoch, from where an interrupted run has ended, and the terms' means.

    Args:
        loader: the train loader; where its sampler is a PairSampler, its epoch goes on too.
        title: of the progress bar.
        interruption: after the step in which its signal comes, :class:`Interrupted` is raised,
            where batches are left.
        resumed: what :meth:`interrupted_state` has given as "interrupted": the batches that were
            trained on are drawn and left out.

    Attributes:
        done: batches that were trained on, those before the interruption included.

    Raises:
        ValueError: the interrupted run had other batches: its epoch can't go on with these.

    Example:
        >>> epoch = Epoch([1, 2, 3], "Epoch 1", resumed={"batches": 1})
        >>> list(epoch), epoch.done
        ([2, 3], 3)
        >>> epoch.add({"loss": 4.1751, "loss_ide": 4.1271, "loss_ia": 0.0155, "acc": 12.5})
        >>> epoch.line(lr=0.001, epochs_left=0)
        'Epoch 1  L 4.175  L_ide 4.127  L_ia 0.015  acc 12.50%  lr 0.001  left 0:00:00'
    """

    def __init__(
        self,
        loader: Any,
        title: str,
        *,
        interruption: Interruption | None = None,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self.loader = loader
        self.title = title
        self.interruption = interruption or Interruption()
        self._resumed = resumed or {}
        self._terms: dict[str, tuple[float, int]] = dict(self._resumed.get("terms", {}))
        self._begun: dict[str, Any] = {"random_state": random_state()}
        sampler = getattr(loader, "sampler", None)
        self._rows: int | None = None
        if isinstance(sampler, PairSampler):
            self._begun["sampler_epoch"] = sampler.epoch
            self._rows = sampler.batch_size * sampler.num_replicas
        self._skipped: int = self._resumed.get("skipped", 0)
        if self._rows != self._resumed.get("rows", self._rows):
            raise ValueError(
                f"the interrupted run had batches of {self._resumed['rows']} images over all its "
                f"processes, got {self._rows}: within an epoch, a run goes on with the same"
            )
        self.done = self._resumed.get("batches", 0)
        self._began = time.monotonic()

    def __len__(self) -> int:
        """Returns the number of batches of the whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches that are left."""
        batches = iter(self.loader)
        for _ in range(self.done):
            next(batches)
        if "random_state" in self._resumed:
            set_random_state(self._resumed["random_state"])
        bar = tqdm(
            total=len(self), initial=self.done, desc=self.title, unit="batch", leave=False,
            disable=None if self.interruption.processes.leads else True,
        )  # fmt: skip
        with bar:
            while self.done < len(self):
                self.interruption.stop()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError:  # the signal may have ended the loader's processes too
                    self.interruption.stop()
                    raise
                yield batch
                self.done += 1
                bar.update()

    def add(self, summary: dict[str, float] | None) -> None:
        """Takes the terms of a step into the means; None: of one that was skipped."""
        if summary is None:
            self._skipped += 1
            return
        for name, value in summary.items():
            total, count = self._terms.get(name, (0.0, 0))
            self._terms[name] = total + value, count + 1

    def means(self) -> dict[str, float]:
        """Returns the mean of every term, and the number of steps "skipped" where there are any."""
        means = {name: total / count for name, (total, count) in self._terms.items()}
        return means | ({"skipped": self._skipped} if self._skipped else {})

    def line(self, lr: float, epochs_left: int) -> str:
        """Returns the means in a line of at most 100 columns, with the time that is left to train.

        Args:
            lr: the learning rate of this epoch.
            epochs_left: that follow, and take as long.
        """
        means, batches = self.means(), max(self.done - self._resumed.get("batches", 0), 1)
        words = [f"{name} {_short(means[term])}" for term, name in _SHOWN.items() if term in means]
        words += [f"acc {_short(means['acc'])}%"] if "acc" in means else []
        words += [f"skipped {self._skipped}"] if self._skipped else []
        seconds = (time.monotonic() - self._began) / batches * len(self) * epochs_left
        minutes, second = divmod(round(seconds), 60)
        left = f"left {minutes // 60}:{minutes % 60:02}:{second:02}"
        line = "  ".join([self.title, *words, f"lr {lr:.2g}", left])
        return line if len(line) <= 100 else re.sub(" +", " ", line)

    def interrupted_state(self) -> dict[str, Any]:
        """Returns what a checkpoint within this epoch holds in place of a finished epoch's state.

        Going on from it, the epoch begins as it did, and leaves out what was done.
        """
        inner = {"batches": self.done, "terms": self._terms, "random_state": random_state()}
        inner |= {"rows": self._rows, "skipped": self._skipped}
        return {**self._begun, "interrupted": inner}


def _short(value: float) -> str:
    """Returns a number in five characters, as far as it can be."""
    return f"{value:.{max(0, 4 - len(str(int(abs(value)))))}f}"


def pictures_of(names: Sequence[str] | None, imgs: Tensor, limit: int = 4) -> str:
    """Returns which pictures of a batch are to be looked at: those that are not finite, or some.

    Example:
        >>> pictures_of(["a.jpg", "b.jpg"], torch.tensor([0.0, torch.nan]).view(2, 1, 1, 1))
        'b.jpg holds NaN or infinity'
    """
    finite = imgs.isfinite().flatten(1).all(1).tolist()
    listed = list(names) if names is not None else [f"image {row}" for row in range(len(imgs))]
    bad = [name for name, good in zip(listed, finite, strict=True) if not good]
    shown = ", ".join(map(str, (bad or listed)[:limit]))
    more = len(bad or listed) - limit
    shown += f" and {more} more" if more > 0 else ""
    return f"{shown} hold{'s' if len(bad) == 1 else ''} NaN or infinity" if bad else shown
