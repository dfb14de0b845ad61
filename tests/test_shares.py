"""What any sampler draws is dealt to all processes."""

from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from casn_plugin.shares import SharedSampler


class Third(SharedSampler):
    """As the third of three processes, to which process 0 tells what it has drawn."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.num_replicas, self.rank = 3, 2


def test_each_takes_its_batch_of_every_three():
    assert list(Third(range(100, 120), batch_size=3)) == [106, 107, 108, 115, 116, 117]
    assert len(Third(range(100, 120), batch_size=3)) == 6
    assert list(SharedSampler(range(5), batch_size=2)) == [0, 1, 2, 3]


def test_the_loader_of_a_data_manager_deals():
    manager = SimpleNamespace(train_loader=DataLoader(list(range(10)), batch_size=4))
    assert SharedSampler.install(manager) is manager
    assert [batch.tolist() for batch in manager.train_loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for bad, error in ((DataLoader([1], batch_size=None), ValueError), ([1], TypeError)):
        with pytest.raises(error):
            SharedSampler.install(SimpleNamespace(train_loader=bad))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SharedSampler([1], batch_size=0)
