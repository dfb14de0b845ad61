"""A data loader like another one, of the same data, that draws otherwise."""

from typing import Any

from torch.utils.data import DataLoader

_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
"""What a loader keeps of another, of all that can be read from one."""


def like(loader: DataLoader[Any], **drawn: Any) -> DataLoader[Any]:
    """Returns a loader of the same data set with the same workers and settings.

    Args:
        loader: the other one.
        **drawn: how it draws (sampler, batch_size, drop_last or batch_sampler), and settings that
            differ.

    Example:
        >>> other = like(DataLoader([1, 2, 3], timeout=0), batch_size=2, sampler=[2, 0, 1])
        >>> [batch.tolist() for batch in other]
        [[3, 1], [2]]
    """
    kept = {name: getattr(loader, name) for name in _KEPT}
    return DataLoader(loader.dataset, **{**kept, **drawn})
