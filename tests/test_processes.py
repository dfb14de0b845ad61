"""One protocol for several processes: share, gather, fail together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starting import finish_two

from casn_plugin.processes import Processes


def test_two_processes_share_gather_and_fail_together(tmp_path):
    """Each at every place, one or both; each then gathers as many times as the other."""
    assert finish_two("work_together", tmp_path) == ["done\n", "done\n"]


def test_alone_nothing_is_exchanged():
    alone = Processes()
    assert (alone.rank, alone.count) == (0, 1) and alone.share("abc") == "abc"
    thing, own = object(), torch.rand(2)
    assert alone.gather(thing) == [thing]
    assert alone.join(own, own)[1] is own
    with pytest.raises(OSError, match="no disk"), alone.together():
        raise OSError("no disk")


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_in_order_are_the_whole_and_differ_by_one_at_most(length, count):
    shares = []
    for rank in range(count):
        processes = Processes()
        processes.rank, processes.count = rank, count
        shares.append(processes.share(range(length)))
    assert [item for share in shares for item in share] == list(range(length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_group_must_be_there():
    with pytest.raises(ValueError, match=r"needs torch.distributed.init_process_group\(\)"):
        Processes(distributed=True)
