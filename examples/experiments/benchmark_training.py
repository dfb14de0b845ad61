#!/usr/bin/env python
r"""Measures what a training step with attention losses costs beside the step without them.

A step is the forward and the backward pass of a batch. The floor is the step of L_ide and one more
pass to and fro that trains no weight, as the masked images of Eq. 2 need it. Steps of one network
take turns within one run; times are medians: on the CPU of processor time, which other programs
disturb less. Prints two tables in Markdown.

    OMP_NUM_THREADS=1 python examples/experiments/benchmark_training.py
    python examples/experiments/benchmark_training.py --networks resnet50 --device cuda
"""

import argparse
import copy
import resource
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
import torchreid
from benchmark_heads import table
from benchmark_pairs import interleaved
from device_reads import META, Reads
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from casn_plugin import CASN, IdentificationAttentionLoss, SiameseAttentionLoss
from casn_plugin.heap import kept_heap
from casn_plugin.hooks import constant_parameters, frozen_batchnorm
from casn_plugin.losses import identification_loss
from casn_plugin.objective import loss_terms
from casn_plugin.training import FiniteSteps

NETWORKS = (
    "resnet50", "osnet_x1_0", "mobilenetv2_x1_0", "pcb_p6", "timm:mobilenetv3_large_100",
    "timm:vit_tiny_patch16_224",
)  # fmt: skip
IDENTITIES = 751
PLAIN, FLOOR, BOTH = "L_ide", "floor", "both losses"
IA, SA = IdentificationAttentionLoss(), SiameseAttentionLoss()
LOSSES = {"L_ia": (IA, None), "L_sa": (None, SA), BOTH: (IA, SA)}
PARTS = ("costs", "settings")
SETTINGS = ("float32", "channels last", "bfloat16", "compiled")
COMPILED = {
    "resnet18": [f"layer{number}" for number in range(1, 5)],
    "resnet50": [f"layer{number}" for number in range(1, 5)],
    "timm:vit_tiny_patch16_224": [f"blocks.{number}" for number in range(11)],
}
"""Layers before the tapped map, which are differentiated once, by networks."""


class Steps:
    """The steps of one network: of itself, and of a CASN around a copy of it.

    Args:
        name: of torchreid's factory; or of timm, "timm:" before it.
        args: the options.
        setting: how the networks are computed, one of SETTINGS.
    """

    def __init__(self, name: str, args: argparse.Namespace, setting: str = "float32") -> None:
        torch.manual_seed(0)
        size, cuda = tuple(args.size), args.device == "cuda"
        if name.startswith("timm:"):
            import timm

            options: dict[str, Any] = {"img_size": size} if "vit" in name else {}
            net = timm.create_model(name[5:], num_classes=IDENTITIES, **options)
        else:
            net = torchreid.models.build_model(name, IDENTITIES, pretrained=False, use_gpu=cuda)
        self.model = CASN(net, input_size=size).to(args.device).train()
        self.net = copy.deepcopy(self.model.backbone)
        self.imgs = torch.rand(args.batch_size, 3, *size, device=args.device)
        number = torch.arange(args.batch_size)
        self.pids = torch.where(number % 4 == 3, number, number // 2)  # every other pair differs
        self.half = setting == "bfloat16"
        if setting == "channels last":
            self.imgs = self.imgs.to(memory_format=torch.channels_last)
            self.model.backbone.to(memory_format=torch.channels_last)
            self.net.to(memory_format=torch.channels_last)
        if setting == "compiled":
            for layer in COMPILED[name]:
                self.model.backbone.get_submodule(layer).compile()
                self.net.get_submodule(layer).compile()

    def loss(self, what: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns a loss and its terms."""
        with torch.autocast(self.imgs.device.type, torch.bfloat16) if self.half else nullcontext():
            if what == PLAIN:
                loss = identification_loss(self.net(self.imgs), self.pids)
                return loss, {"loss": loss.detach()}
            identification, siamese = LOSSES[what]
            output = self.model(self.imgs, self.pids, identification, siamese)
            loss_ide = identification_loss(output.logits, self.pids)
            return loss_terms(output, self.pids, loss_ide, siamese=siamese)

    def take(self, what: str) -> None:
        """Takes a step, without the optimizer's part of it."""
        for parameter in (*self.net.parameters(), *self.model.parameters()):
            parameter.grad = None
        self.loss(PLAIN if what == FLOOR else what)[0].backward()
        if what != FLOOR:
            return
        imgs = self.imgs.clone().requires_grad_()
        half = torch.autocast(imgs.device.type, torch.bfloat16) if self.half else nullcontext()
        with half, frozen_batchnorm(self.net), constant_parameters(self.net):
            loss = identification_loss(self.net(imgs), self.pids)
        loss.backward()

    def each(self) -> dict[str, Callable[[], None]]:
        """Returns all steps."""
        return {what: partial(self.take, what) for what in (PLAIN, FLOOR, *LOSSES)}


def convolution_backward(
    gradients: list[int], imgs: list[int], weights: list[int], *more: Any, **_: Any
) -> int:
    """Returns the FLOPs of a convolution's gradients.

    PyTorch's own formula takes the weights of a grouped convolution for those of a full one: of
    each depthwise layer it counts as many times too much as there are channels.
    """
    transposed, wanted = more[4], more[7]
    positions = (imgs if transposed else gradients)[2:]
    multiplied: int = gradients[0] * prod(positions) * prod(weights) * sum(wanted[:2])
    return 2 * multiplied


def flops(step: Callable[[], None]) -> int:
    """Returns the FLOPs of a step, without fused attention, which is not counted everywhere."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as all,
    ):
        step()
    counted: int = all.get_total_flops()
    return counted


def saved(steps: Steps, what: str) -> int:
    """Returns the bytes that a step keeps for its backward pass, weights left out."""
    states = (*steps.net.state_dict().values(), *steps.model.state_dict().values())
    own = {each.untyped_storage().data_ptr() for each in states}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        steps.take(what)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak(steps: Steps, what: str) -> int:
    """Returns the bytes that a step needs at once beside weights and images, gradients included."""
    for parameter in (*steps.net.parameters(), *steps.model.parameters()):
        parameter.grad = None
    if steps.imgs.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps.take(what)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        steps.take(what)
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = [0]
    for each in sorted(events, key=lambda each: each.start_ns()):
        now.append(now[-1] + each.nbytes())
    return max(now)


def page_faults(step: Callable[[], None], steps: int = 3) -> int:
    """Returns how many pages of memory a step takes anew from the system, and gives back."""
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // steps


def host_reads(steps: Steps) -> int:
    """Returns how often a step reads the device, its check for finite numbers included."""
    there = copy.copy(steps)
    there.model, there.imgs = copy.deepcopy(steps.model).to(META), steps.imgs.to(META)
    finite = FiniteSteps(there.model, torch.optim.SGD(there.model.parameters(), 1e-3))
    with Reads() as reads, finite.watched():
        finite.take([there.loss(BOTH)], lambda: "")
    return len(reads.calls)


def graph_breaks(steps: Steps) -> str:
    """Returns the breaks that torch.compile makes: in a step's loss, and in features."""
    counts = []
    for function in (lambda: steps.loss(BOTH)[0], lambda: steps.model.eval()(steps.imgs)):
        torch.compiler.reset()
        counts.append(torch._dynamo.explain(function)().graph_break_count)
    steps.model.train()
    return " / ".join(map(str, counts))


def costs_of(name: str, args: argparse.Namespace) -> list[str]:
    """Returns the row of a network: what losses cost beside L_ide alone."""
    steps = Steps(name, args)
    each = steps.each()
    counted = {what: flops(step) for what, step in each.items()}
    seconds = interleaved(each, args.repeats, args.device)
    memory = [saved(steps, BOTH) / saved(steps, PLAIN), peak(steps, BOTH) / peak(steps, PLAIN)]
    others = (FLOOR, *LOSSES)
    return [
        name, f"{counted[PLAIN] / 1e9:,.1f}",
        *(f"{counted[what] / counted[PLAIN]:.2f}" for what in others),
        f"{1000 * seconds[PLAIN]:,.0f} ms",
        *(f"{seconds[what] / seconds[PLAIN]:.2f}" for what in others),
        f"{page_faults(each[PLAIN]):,} / {page_faults(each[BOTH]):,}",
        *(f"{ratio:.2f}" for ratio in memory),
        str(host_reads(steps)), graph_breaks(steps),
    ]  # fmt: skip


def settings_of(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Returns the rows of a network: steps under each setting that it bears."""
    chosen = [each for each in args.settings if each != "compiled" or name in COMPILED]
    functions: dict[str, Callable[[], None]] = {}
    for setting in tuple(chosen):
        each = Steps(name, args, setting).each()
        try:
            each[BOTH]()
        except RuntimeError:  # torchreid's PCB views features that lie otherwise, and can't
            chosen.remove(setting)
            continue
        functions |= {f"{setting}, {what}": each[what] for what in (PLAIN, FLOOR, BOTH)}
    seconds = interleaved(functions, args.repeats, args.device)
    rows = []
    for setting in chosen:
        plain, floor, both = (seconds[f"{setting}, {what}"] for what in (PLAIN, FLOOR, BOTH))
        beside = plain / seconds[f"{chosen[0]}, {PLAIN}"]
        rows.append([
            name, setting, f"{1000 * plain:,.0f} ms", f"{beside:.2f}", f"{floor / plain:.2f}",
            f"{both / plain:.2f}",
        ])  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> list[str]:
    """Measures what the options ask for; returns the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--size", nargs=2, type=int, default=[256, 128], help="rows and columns")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS[:3])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heap", choices=("kept", "system"), default="system", help="whether "
        "freed memory of the host stays, as the engine sees to it on a CPU")  # fmt: skip
    args = parser.parse_args(argv)
    with kept_heap() if args.heap == "kept" else nullcontext():
        return measured(args)


def measured(args: argparse.Namespace) -> list[str]:
    """Returns the tables, which are printed."""
    batch = f"{args.batch_size} images of {'x'.join(map(str, args.size))} ({args.device})"
    steps = ("floor", "L_ia", "L_sa", "both")
    ratios = [f"× {what}" for what in steps]
    header = [
        "Network", "GFLOP", *ratios, "Time", *ratios, "Page faults", "× saved", "× peak",
        "Host reads", "Graph breaks",
    ]  # fmt: skip
    tables = []
    if "costs" in args.only:
        rows = [costs_of(name, args) for name in args.networks]
        tables.append(table(f"A training step of {batch}", header, rows))
        print(tables[-1])
    if "settings" in args.only:
        header = ["Network", "Setting", "L_ide", f"× {args.settings[0]}", "× floor", "× both"]
        rows = [row for name in args.networks for row in settings_of(name, args)]
        tables.append(table(f"Layouts and precisions, {batch}", header, rows))
        print(tables[-1])
    return tables


if __name__ == "__main__":
    main()
