"""Attention that can be differentiated twice, and the process's kernels as they were."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from casn_plugin.kernels import twice_differentiable


def kernels() -> tuple[bool, ...]:
    backends = torch.backends.cuda
    return (
        backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(), backends.cudnn_sdp_enabled(),
    )  # fmt: skip


def twice(x: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(
        scaled_dot_product_attention(x, x, x).square().sum(), x, create_graph=True
    )
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def test_fused_attention_has_a_second_derivative_inside():
    x = torch.rand(1, 2, 8, 16, requires_grad=True)
    with pytest.raises(RuntimeError):
        twice(x)  # this is why the context is there
    with twice_differentiable():
        assert twice(x).isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_has_a_second_derivative_inside(inplace):
    layer, x = nn.Hardsigmoid(inplace), torch.linspace(-4, 4, 9, requires_grad=True)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        given = layer(x.clone())
        return given, torch.autograd.grad(given.pow(2).sum(), x, create_graph=True)[0]

    expected, slopes = gradient()
    with pytest.raises(RuntimeError):
        slopes.sum().backward()  # this is why the context is there
    with twice_differentiable():
        given, found = gradient()
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(found, slopes)
    (second,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(second, torch.where(x.abs() < 3, 2 / 36, 0.0))


def test_the_kernels_are_left_as_found():
    before = kernels()
    with pytest.raises(ZeroDivisionError), twice_differentiable():
        assert kernels() == (False, False, True, False)
        raise ZeroDivisionError
    assert kernels() == before
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        chosen = kernels()
        with twice_differentiable(), twice_differentiable():
            assert kernels() != chosen
        assert kernels() == chosen
    assert kernels() == before


def test_threads_that_overlap_leave_the_kernels_as_found():
    before, first_in, second_in, first_out = kernels(), *(threading.Event() for _ in range(3))

    inside = []

    def first() -> None:
        with twice_differentiable():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with twice_differentiable():
            second_in.set()
            first_out.wait(10)
            inside.append(kernels())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [(False, False, True, False)] and kernels() == before
