"""Looks: who differs from whom, and by how much."""

from dataclasses import fields

import numpy as np

from casn_plugin.pedestrians.looks import look_of, twin_of


def test_one_identity_in_four_is_a_look_alike() -> None:
    def differing(pid: int, other: int) -> int:
        one, two = look_of(0, pid), look_of(0, other)
        return sum(getattr(one, f.name) != getattr(two, f.name) for f in fields(one))

    for pid in range(1, 101):
        if pid % 4 == 3:
            assert twin_of(pid) == pid - 1
            assert differing(pid, pid - 1) <= 4
        else:
            assert twin_of(pid) is None
            assert differing(pid, pid + 4) > 8
    assert np.mean([differing(pid, pid - 1) > 0 for pid in range(3, 103, 4)]) > 0.9
