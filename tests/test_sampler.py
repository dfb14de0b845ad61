"""What every epoch of the pair sampler must hold, for any data set."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from casn_plugin import PairSampler

data_sets = st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 3)), min_size=1, max_size=60)


@given(
    rows=data_sets,
    half_batch=st.integers(1, 8),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=400)
def test_every_epoch_holds_what_is_promised(rows, half_batch, fraction, seed):
    pids, camids = np.array(rows).T
    try:
        sampler = PairSampler(
            pids, camids, batch_size=2 * half_batch, positive_fraction=fraction, seed=seed
        )
    except ValueError:
        return  # which inputs are refused is tested below
    for _ in range(2):
        drawn = np.array(list(sampler))
        assert len(drawn) == len(sampler) and len(sampler) % (2 * half_batch) == 0
        assert set(drawn) == set(range(len(rows)))  # every image
        first, second = drawn[0::2], drawn[1::2]
        assert (first != second).all()
        same = pids[first] == pids[second]
        assert abs(same.sum() - fraction * len(same)) < 1
        per_batch = same.reshape(-1, half_batch).sum(1)
        assert (abs(per_batch - fraction * half_batch) < 1).all()
        for a, b in zip(first[same], second[same], strict=True):
            if len(set(camids[pids == pids[a]])) > 1:
                assert camids[a] != camids[b]


def test_an_ordinary_epoch_draws_each_image_once():
    pids = np.repeat(np.arange(20), 8)
    sampler = PairSampler(pids, np.tile([0, 1], 80), batch_size=16)
    assert len(sampler) == len(pids)
    assert sorted(sampler) == list(range(len(pids)))


@given(
    count=st.integers(1, 5), half_batch=st.integers(1, 4), fraction=st.sampled_from([0, 0.3, 0.5])
)
@settings(deadline=None, max_examples=60)
def test_processes_draw_together_what_one_would(count, half_batch, fraction):
    pids, camids = np.arange(60) % 9, np.arange(60) % 4

    def make(rows: int, **shares: int) -> PairSampler:
        sampler = PairSampler(
            pids, camids, batch_size=rows, positive_fraction=float(fraction), **shares
        )
        sampler.set_epoch(2)
        return sampler

    rows = 2 * half_batch
    shares = [make(rows, num_replicas=count, rank=rank) for rank in range(count)]
    drawn = np.array([list(each) for each in shares])
    assert drawn.shape == (count, len(shares[0])) and len(shares[0]) % rows == 0
    together = drawn.reshape(count, -1, rows).swapaxes(0, 1).ravel()  # batch by batch
    assert together.tolist() == list(make(count * rows))
    assert set(together) == set(range(60))


def test_a_share_is_one_of_those_that_there_are():
    options = {"pids": [0, 0, 1, 1], "batch_size": 2}
    assert (PairSampler(**options).num_replicas, PairSampler(**options).rank) == (1, 0)
    for shares, message in (
        ({"num_replicas": 0}, "num_replicas must be at least 1, got 0"),
        ({"num_replicas": 2, "rank": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"rank": -1}, "rank must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PairSampler(**options, **shares)


def test_seed_and_epoch_decide_the_order():
    def make(seed: int) -> PairSampler:
        return PairSampler(np.repeat(np.arange(9), 4), batch_size=4, seed=seed)

    sampler, twin = make(1), make(1)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs == [list(twin) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(make(2)) != epochs[0]
    fresh = make(1)
    fresh.set_epoch(2)
    assert list(fresh) == epochs[2]
    before = np.random.get_state()[1].tolist()
    list(sampler)
    assert np.random.get_state()[1].tolist() == before  # its own generator


def test_pairs_meet_all_identities_and_both_orders():
    """Over epochs, negative pairs are not of the same few identities, and no camera comes first."""
    sampler = PairSampler(np.repeat(np.arange(8), 4), np.tile([0, 1], 16), batch_size=8)
    met, first_camera = set(), 0
    for _ in range(30):
        drawn = np.array(list(sampler)).reshape(-1, 2)
        met |= {tuple(sorted(pair)) for pair in (drawn // 4) if pair[0] != pair[1]}
        first_camera += int((drawn[:, 0] % 2 == 0).sum())
    assert len(met) == 8 * 7 // 2
    assert 0.4 < first_camera / (30 * len(sampler) / 2) < 0.6


@pytest.mark.parametrize(
    ("pids", "options", "message"),
    [
        ([0, 0, 1], {"batch_size": 3}, "batch_size must be even, got 3"),
        ([0, 0, 1], {"batch_size": 0}, "batch_size must be even, got 0"),
        ([], {"batch_size": 2}, "non-empty"),
        ([0, 0], {"batch_size": 2}, "at least two identities"),
        ([0, 1], {"batch_size": 2}, "an identity with two images"),
        ([0, 0, 1], {"batch_size": 2, "positive_fraction": 1.0}, "1 identities have one image"),
        ([0, 0, 1], {"batch_size": 2, "positive_fraction": 1.5}, r"\[0, 1\], got 1.5"),
        ([0, 0, 1], {"batch_size": 2, "camids": [0]}, r"camids must be .* got shape \(1,\)"),
        ([0, 0, 1], {"batch_size": 2, "seed": -1}, "seed must be >= 0, got -1"),
        ([0, 0, -1], {"batch_size": 2}, "pairs need known identities, but 1 of 3 are unknown"),
        ([0, 0, 1], {"batch_size": 2, "positive_fraction": float("nan")}, "got nan"),
    ],
)
def test_bad_input_says_what_was_expected(pids, options, message):
    with pytest.raises(ValueError, match=message):
        PairSampler(pids, **options)


class Rows(Dataset):
    train = [(f"{i}.jpg", i // 4, i % 2, 0) for i in range(40)]  # noqa: RUF012

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, index: int) -> dict:
        _, pid, camid, _ = self.train[index]
        return {"pid": pid, "camid": camid}


def test_install_replaces_the_loader_and_keeps_its_settings():
    loader = DataLoader(Rows(), batch_size=8, num_workers=0, pin_memory=False, timeout=0)
    manager = SimpleNamespace(train_loader=loader)
    assert PairSampler.install(manager, seed=3) is manager
    assert isinstance(manager.train_loader.sampler, PairSampler)
    assert manager.train_loader.dataset is loader.dataset
    batches = list(manager.train_loader)
    assert len(batches) == len(manager.train_loader) == 5
    for batch in batches:
        assert (batch["pid"][0::2] == batch["pid"][1::2]).sum() == 2
    for cross_camera in (True, False):
        PairSampler.install(manager, batch_size=4, positive_fraction=1.0, cross_camera=cross_camera)
        assert manager.train_loader.batch_size == 4
        camids = torch.cat([batch["camid"] for batch in manager.train_loader])
        assert bool((camids[0::2] != camids[1::2]).all()) == cross_camera
    for wrong in (SimpleNamespace(), SimpleNamespace(train_loader=[1])):
        with pytest.raises(TypeError, match="expected a torchreid data manager"):
            PairSampler.install(wrong)


@pytest.mark.parametrize("pids", [[0.5, 0.5, 1.0], ["a", "a", "b"], [True, True, False]])
def test_identities_are_integers(unchecked, pids):
    with pytest.raises(TypeError, match="pids must be integers, got"):
        PairSampler(pids, batch_size=2)


@pytest.mark.parametrize("pids", [[1, 1, 2, 2], [0, 0, 2, 2], [0, 0, -1, -1]])
def test_labels_that_are_no_classes_are_found_when_the_sampler_is_installed(pids):
    rows = Rows()
    rows.train = [(f"{i}.jpg", pid, i % 2, 0) for i, pid in enumerate(pids)]
    manager = SimpleNamespace(train_loader=DataLoader(rows, batch_size=2))
    with pytest.raises(ValueError, match=r"training images must be the classes 0 \.\.\. 1"):
        PairSampler.install(manager)


def test_install_draws_what_the_class_does_from_the_same_settings():
    rows = Rows()
    pids, camids = zip(*(row[1:3] for row in rows.train), strict=True)
    for asked, cameras, seed in (({}, camids, 0), ({"seed": 5, "cross_camera": False}, None, 5)):
        manager = SimpleNamespace(train_loader=DataLoader(rows, batch_size=8))
        PairSampler.install(manager, **asked)
        assert list(manager.train_loader.sampler) == list(
            PairSampler(pids, cameras, batch_size=8, seed=seed)
        )
        assert manager.train_loader.drop_last


@pytest.mark.parametrize("loader", [DataLoader([1, 2]), SimpleNamespace(dataset=Rows())])
def test_what_is_no_loader_of_training_images_is_refused(loader):
    with pytest.raises(
        TypeError,
        match=r"^expected a torchreid data manager, whose train_loader.dataset.train lists the "
        "training images, got SimpleNamespace$",
    ):
        PairSampler.install(SimpleNamespace(train_loader=loader))


def test_settings_are_those_of_an_even_half_unless_others_are_given():
    pids, camids = np.arange(60) // 5, np.arange(60) % 3
    default = PairSampler(pids, camids, batch_size=12)
    given = PairSampler(pids, camids, batch_size=12, positive_fraction=0.5, seed=0)
    assert (default.positive_fraction, default.seed, default.epoch) == (0.5, 0, 0)
    assert list(default) == list(given) and default.epoch == 1


@pytest.mark.parametrize(
    ("pids", "camids", "batch_size", "fraction", "length"),
    [
        ([0, 0, 1, 1], None, 2, 0.0, 4),
        ([0, 0, 0, 0, 0, 0], None, 2, 1.0, 6),
        ([0, 0, 0, 1, 1, 1], None, 2, 1.0, 8),  # each third one meets one that was drawn
        ([0, 0, 1, 1, 2, 3, 4, 5, 6], None, 2, 0.9, 42),  # few pairs for those that are single
        ([0, 0, 0, 0, 1, 2, 3, 4, 5], None, 2, 0.9, 62),
        ([0, 0, 0, 0], [0, 0, 0, 1], 2, 1.0, 6),  # few pairs of two cameras
        # two of one identity would be left for one pair of different identities
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 0, 1], 8, 0.75, 16),
    ],
)
def test_an_epoch_is_as_long_as_it_takes_to_draw_every_image(
    pids, camids, batch_size, fraction, length
):
    sampler = PairSampler(pids, camids, batch_size=batch_size, positive_fraction=fraction)
    for _ in range(5):
        assert set(sampler) == set(range(len(pids))) and len(sampler) == length


def test_what_an_identity_that_is_most_images_must_not_meet_is_drawn_evenly():
    """Its own images are replaced, where they would be both in a pair, by all the others."""
    sampler = PairSampler([0] * 300 + list(range(1, 41)), batch_size=2, positive_fraction=0.0)
    times = np.bincount(list(sampler), minlength=340)
    assert times.min() >= 1 and times[300:].max() < 30
    assert times[:300].sum() == times[300:].sum() == 300


@pytest.mark.parametrize(
    ("pids", "options", "message"),
    [
        ([0, 0, 1], {"batch_size": -2}, "batch_size must be >= 0, got -2"),
        ([0, 0, 1], {"positive_fraction": -0.5}, "positive_fraction must be >= 0 and finite, got"),
        ([], {}, "pids must be a non-empty list, got none$"),
        ([0, 0, 1], {"seed": 2**63}, f"seed must be at most {2**63 - 1}, got {2**63}$"),
        ([0, 0], {}, "pairs of different identities need at least two identities, got one; "
                     "positive_fraction=1 draws same-identity pairs only$"),
        ([0, 1], {}, "same-identity pairs need an identity with two images, but each has one; "
                     "positive_fraction=0 draws different-identity pairs only$"),
        ([0, 0, 1], {"positive_fraction": 1.0},
         "1 identities have one image and can be drawn in different-identity pairs only: "
         "positive_fraction must be below 1$"),
    ],
)  # fmt: skip
def test_errors_name_the_setting_and_what_else_could_be_done(pids, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PairSampler(pids, **{"batch_size": 2, **options})


def test_what_the_errors_advise_is_possible():
    assert len(set(PairSampler([0, 1], batch_size=2, positive_fraction=0.0))) == 2
    assert len(set(PairSampler([0, 0], batch_size=2, positive_fraction=1.0))) == 2
    assert set(PairSampler([0, 0, 1, 1], batch_size=2, seed=2**63 - 1)) == {0, 1, 2, 3}
