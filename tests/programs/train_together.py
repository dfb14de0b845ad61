"""Trains, alone or as one of two processes: train_together.py FOLDER SCENARIO,... [RANK].

What each scenario leaves is kept as FOLDER/SCENARIO-COUNT-RANK.pt. Tests call `run` for one
process; the pictures are in FOLDER/pictures.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchreid
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import (
    CASN,
    BatchPairs,
    ImageCASNEngine,
    MetricOptions,
    PairSampler,
    RankingOptions,
    SiameseAttentionLoss,
)
from casn_plugin.processes import Processes, launched
from casn_plugin.shares import SharedSampler
from casn_plugin.training import Interrupted

SIZE = (32, 16)
TRAIN = [(pid, camid, index) for pid in range(5) for camid in range(2) for index in range(4)]
TEST = [(pid, camid, 0) for pid in range(5, 9) for camid in range(3)]


def draw(folder: Path) -> None:
    """Writes noise, a little alike for one person."""
    rng = np.random.default_rng(0)
    people = rng.integers(0, 255, (9, *SIZE, 3))
    (folder / "pictures").mkdir(parents=True)
    for pid, camid, index in TRAIN + TEST:
        noise = (people[pid] + rng.integers(0, 255, (*SIZE, 3))) // 2
        picture = Image.fromarray(noise.astype(np.uint8))
        picture.save(folder / "pictures" / f"{pid}_{camid}_{index}.png")


class Net(nn.Module):
    """Looks like a model of torchreid's factory, with a norm below the map and one above it."""

    loss = "softmax"

    def __init__(self, norms: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8) if norms else nn.GroupNorm(2, 8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2),
        )  # fmt: skip
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.neck = nn.BatchNorm1d(8) if norms else nn.Dropout(dropout)
        self.classifier = nn.Linear(8, 5)

    def forward(self, imgs):
        features = self.neck(self.global_avgpool(self.conv(imgs)).flatten(1))
        if not self.training:
            return features
        logits = self.classifier(features)
        return logits if self.loss == "softmax" else (logits, features)


def make(
    folder,
    *,
    rows=16,
    norms=False,
    dropout=0.0,
    balanced=False,
    wrap=lambda model: model,
    **options,
):
    """An engine whose batches have so many rows over all processes."""
    data = [[(str(Path(folder, "pictures", f"{p}_{c}_{i}.png")), p, c) for p, c, i in part]
            for part in (TRAIN, TEST[::3], [row for row in TEST if row[1]])]  # fmt: skip

    class Data(torchreid.data.ImageDataset):
        def __init__(self, root="", **kwargs):
            super().__init__(*data, **kwargs)

    with suppress(ValueError):
        torchreid.data.register_image_dataset("noise", Data)
    count = Processes.found().count
    datamanager = torchreid.data.ImageDataManager(
        sources="noise", height=SIZE[0], width=SIZE[1], batch_size_train=rows // count,
        batch_size_test=3, workers=0, use_gpu=False, transforms=[], num_instances=4,
        train_sampler="RandomIdentitySampler" if balanced else "RandomSampler",
    )  # fmt: skip
    if balanced:
        SharedSampler.install(datamanager)
    else:
        PairSampler.install(datamanager, seed=3)
    torch.manual_seed(1)
    model = CASN(Net(norms, dropout), input_size=SIZE, hidden_dim=8)
    torch.manual_seed(Processes.found().rank)
    metric = options.get("metric")
    beside = [] if metric is None else [*metric.modules.parameters()]
    optimizer = torch.optim.SGD(
        [*model.parameters(), *beside], lr=0.05, momentum=0.9, weight_decay=1e-3
    )
    options = {"lambda_ia": 0.5, "lambda_sa": 0.5, "logged_pairs": 2, **options}
    return ImageCASNEngine(datamanager, wrap(model), optimizer, use_gpu=False, **options)


def state(engine) -> dict:
    """What a run leaves."""
    return {
        "weights": {name: each.clone() for name, each in engine.casn.state_dict().items()},
        "history": engine.history, "results": engine.results, "skipped": engine._steps.skipped,
    }  # fmt: skip


def trained(folder, name, *, epochs=2, run=(), **options) -> dict:
    """What an engine is after some epochs."""
    engine = make(folder, **options)
    engine.run(save_dir=f"{folder}/{name}", max_epoch=epochs, **dict(run))
    return state(engine)


def with_norms(folder, name):
    return trained(folder, name, norms=True, sync_batchnorm=True)


def own_norms(folder, name):
    """Each normalises its share: the statistics are those of process 0."""
    return trained(folder, name, norms=True)


class Proxies(nn.Module):
    """A metric loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.arange(40.0).view(5, 8).cos())

    def forward(self, features, pids):
        return (features - self.proxies[pids]).square().mean()


def balanced(folder, name):
    """torchreid's own sampler of balanced batches, dealt to both, and every loss that there is.

    One process takes as the parts of a batch what the two have drawn.
    """
    alone = Processes.found().count == 1
    engine = make(
        folder, balanced=True, metric=MetricOptions(metric_loss=Proxies()),
        siamese=SiameseAttentionLoss(pairs=BatchPairs()), accumulate=2 if alone else 1,
    )  # fmt: skip
    loader, seen, parse = engine.train_loader, [], engine.parse_data_for_train
    names = [row[0] for row in loader.dataset.train]
    drawn = [torch.load(f"{folder}/balanced-2-{rank}.pt")["rows"] for rank in range(2 * alone)]
    batches = [own + other for own, other in zip(*drawn, strict=True)] if alone else []

    def parse_data_for_train(data):
        seen.append([names.index(path) for path in data["impath"]])
        return parse(data)

    engine.parse_data_for_train = parse_data_for_train
    for epoch in range(2):
        if alone:
            some = batches[epoch * len(batches) // 2 : (epoch + 1) * len(batches) // 2]
            engine.train_loader = DataLoader(loader.dataset, batch_sampler=some)
        engine.run(save_dir=f"{folder}/{name}", start_epoch=epoch, max_epoch=epoch + 1)
    proxies = {"proxies": engine.metric.metric_loss.proxies.detach().clone()}
    found = state(engine)
    return {**found, "weights": found["weights"] | proxies, "rows": seen, "drawn": len(loader)}


def in_parts(folder, name):
    """The user's own DistributedDataParallel is taken off."""
    wrap = nn.parallel.DistributedDataParallel if dist.is_initialized() else nn.DataParallel
    return trained(folder, name, accumulate=2, wrap=wrap)


def frozen(folder, name):
    """Layers that are frozen for an epoch, a pair classifier without a loss."""
    opened = {"fixbase_epoch": 1, "open_layers": ["classifier"]}
    return trained(folder, name, lambda_sa=0.0, run=opened)


def bad_picture(folder, name):
    """A picture in one process's share holds NaN."""
    engine = make(folder)
    parse = engine.parse_data_for_train

    def with_a_bad_pixel(data):
        if engine.batch_idx == 1 and engine.processes.rank == engine.processes.count - 1:
            data["img"][2, 0, 0, 0] = torch.nan
        return parse(data)

    engine.parse_data_for_train = with_a_bad_pixel
    engine.run(save_dir=f"{folder}/{name}", max_epoch=1)
    return state(engine)


def whole(folder, name):
    """Three epochs of a network that draws random numbers."""
    return trained(folder, name, epochs=3, dropout=0.3)


def interrupted(folder, name):
    """One process gets a signal in the middle of an epoch; then the run goes on."""
    engine, steps = make(folder, dropout=0.3), []
    inner = engine.forward_backward

    def forward_backward(data):
        steps.append(engine.epoch)
        if len(steps) == 4 and engine.processes.rank == 0:
            signal.raise_signal(signal.SIGTERM)
        return inner(data)

    engine.forward_backward = forward_backward
    try:
        engine.run(save_dir=f"{folder}/{name}", max_epoch=3)
    except Interrupted as error:
        code = error.code
    rest = make(folder, dropout=0.3)
    start = rest.resume(f"{folder}/{name}")
    rest.run(save_dir=f"{folder}/{name}", start_epoch=start, max_epoch=3)
    return {**state(rest), "steps": steps, "start": start, "code": code}


def by_another_number(folder, name):
    """Two epochs of two processes, or of one, were saved: the third is trained by this number."""
    engine = make(folder)
    start = engine.resume(f"{folder}/two_epochs-{3 - engine.processes.count}/model/model.pth.tar-2")
    engine.run(save_dir=f"{folder}/{name}", start_epoch=start, max_epoch=3)
    return state(engine)


def two_epochs(folder, name):
    return trained(folder, name)


def three_epochs(folder, name):
    return trained(folder, name, epochs=3)


def in_a_folder(folder, name):
    ranking = RankingOptions(gallery_dir=f"{folder}/{name}-gallery")
    return trained(folder, name, epochs=1, ranking=ranking)


def full_disk(folder, name):
    """Process 0 can't write: the others hear of it."""
    Path(folder, f"{name}").mkdir(exist_ok=True)
    Path(folder, name, "model").write_text("a file where a folder should be")
    engine = make(folder)
    try:
        engine.run(save_dir=f"{folder}/{name}", max_epoch=1)
    except (OSError, RuntimeError) as error:
        return {"error": repr(error)}


def dying(folder, name):
    """A process is killed in a step, or hangs."""
    engine = make(folder)
    inner = engine.forward_backward

    def forward_backward(data):
        if engine.epoch == 1 and engine.processes.rank == 1:
            if name.startswith("hanging"):
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(data)

    engine.forward_backward = forward_backward
    engine.run(save_dir=f"{folder}/{name}", max_epoch=3)


hanging = dying


def long(folder, name):
    """Started by torchrun: trains until a signal comes."""
    engine = make(folder, rows=4, logged_pairs=0)
    inner, rank = engine.forward_backward, engine.processes.rank

    def forward_backward(data):
        found = inner(data)
        with Path(folder, f"{name}-steps-{rank}").open("a") as file:
            file.write(f"{engine.epoch} {engine.batch_idx}\n")
        time.sleep(0.05)
        return found

    engine.forward_backward = forward_backward
    engine.run(save_dir=f"{folder}/{name}", max_epoch=1000)


def run(folder, scenario) -> dict:
    return globals()[scenario](folder, f"{scenario}-{Processes.found().count}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, scenarios = sys.argv[1], sys.argv[2].split(",")
    if len(sys.argv) < 4:  # torchrun started it
        with launched(timeout=float(os.environ.get("TEST_TIMEOUT", 60))):
            for scenario in scenarios:
                globals()[scenario](folder, scenario)
        raise SystemExit
    rank = int(sys.argv[3])
    Path(folder, f"here-{rank}").touch()  # a short timeout is not spent on imports
    while not Path(folder, f"here-{1 - rank}").exists():
        time.sleep(0.05)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=8 if scenarios == ["hanging"] else 60),
    )  # fmt: skip
    for scenario in scenarios:
        print(f"[{scenario}]")
        torch.save(run(folder, scenario), f"{folder}/{scenario}-2-{rank}.pt")
    dist.destroy_process_group()
