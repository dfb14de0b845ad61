"""One of two processes that share, gather and fail together: work_together.py FOLDER RANK."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from casn_plugin.processes import Processes

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
    timeout=timedelta(seconds=20),
)  # fmt: skip
processes = Processes(distributed=True)
assert (processes.rank, processes.count) == (rank, 2)
assert processes.share(range(5)) == (range(2) if rank == 0 else range(2, 5))
assert list(processes.share([7])) == ([] if rank == 0 else [7])
assert processes.gather("ab"[rank]) == ["a", "b"]
own = torch.full((2, 1 + rank), float(rank)), torch.arange(rank, dtype=torch.long)
first, second = processes.join(own[0], own[0] + 1, dim=1)
assert first.tolist() == [[0, 1, 1]] * 2 and second.tolist() == [[1, 2, 2]] * 2
assert processes.join(own[1])[0].tolist() == [0]


def work(place: int, failing: tuple[int, ...]) -> list[int]:
    """Gathers twice; those that fail do so before the first, between, or after the second."""
    seen = []
    with processes.together():
        for step in range(3):
            if rank in failing and step == place:
                raise OSError(f"no disk {rank}")
            if step < 2:
                seen += processes.gather(10 * step + rank)
    return seen


for place in range(3):
    for failing in ((), (0,), (1,), (0, 1)):
        try:
            found = work(place, failing)
        except OSError as error:  # the very one that was raised
            assert rank in failing and str(error) == f"no disk {rank}", error
        except RuntimeError as error:
            assert rank not in failing, error
            other = 1 - rank
            assert str(error) == f"process {other} failed: OSError('no disk {other}')", error
        else:
            assert not failing and found == [0, 1, 10, 11], found
        # whoever failed, and wherever: the next gathering is the same one for both
        assert processes.gather((place, failing, rank)) == [
            (place, failing, 0),
            (place, failing, 1),
        ]
try:
    with processes.together():  # what can't be sent is a failure like any other
        processes.gather((lambda: 0) if rank else 0)
except Exception as error:
    assert rank or (isinstance(error, RuntimeError) and "process 1 failed" in str(error)), error
    assert "pickle" in str(error).lower() or "lambda" in str(error), error
else:
    raise SystemExit("no error")
assert processes.gather(rank) == [0, 1]
print("done")
dist.destroy_process_group()
