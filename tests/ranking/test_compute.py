"""With what pairs are worked on."""

import pytest
import torch
from small_heads import CHANNELS, Model, encode, pooled

from casn_plugin import Compute, PairClassifier, attention_distmat
from casn_plugin.ranking.compute import Arithmetic, Buffer


def test_what_no_machine_has(unchecked):
    with pytest.raises(ValueError, match="max_memory must be at least 1, got 0"):
        Compute(max_memory=0)
    with pytest.raises(TypeError, match=r"float16 or torch.bfloat16, got torch.float64"):
        Compute(precision=torch.float64)
    with pytest.raises(ValueError, match="init_process_group"):
        Compute(distributed=True)


def test_memory_is_that_of_the_device_unless_it_is_given():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (Compute().memory(cpu), Compute().memory(cuda)) == (2**28, 2**32)
    assert Compute(max_memory=5).memory(cuda) == 5


def test_halves_are_multiplied_where_the_device_can():
    values = torch.tensor([0.1], dtype=torch.float64)
    here = Arithmetic(torch.device("cpu"), torch.float64, torch.bfloat16)
    assert here.products == torch.float64
    assert torch.equal(here.operand(values), values.bfloat16().double())
    there = Arithmetic(torch.device("cuda"), torch.float32, torch.float16)
    assert there.products == torch.float16 and there.operand(values).dtype == torch.float16
    plain = Arithmetic(torch.device("cuda"), torch.float32)
    assert plain.products == torch.float32 and plain.operand(values).item() == values.float().item()


def test_a_buffer_grows_and_is_used_again():
    buffer = Buffer(torch.device("cpu"), torch.float64, 100)
    first = buffer.take((2, 3))
    assert first.shape == (2, 3) and first.dtype == torch.float64
    assert buffer.take((4,)).data_ptr() == first.data_ptr()
    assert buffer.take((5, 5)).shape == (5, 5)


@pytest.mark.parametrize("each", [0, 1, 5, 6, 13, 100])
def test_portions_of_a_buffer_keep_to_its_size(each):
    buffer = Buffer(torch.device("cpu"), torch.float64, 100)  # twelve numbers
    portions = buffer.portions(7, each=each)
    assert [row for some in portions for row in range(7)[some]] == list(range(7))
    largest = max(some.stop - some.start for some in portions)
    assert largest == 1 or largest * each <= 12
    assert largest == 7 or (largest + 1) * each > 12
    assert buffer.portions(0, each=each) == []


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_where_it_is_asked_for(shown, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    attention_distmat(model, encoding, encoding, compute=Compute(progress=shown))
    assert ("Comparing attention" in capsys.readouterr().err) == shown
