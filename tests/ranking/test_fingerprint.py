"""Weights are hashed once, and again whenever they may have changed."""

import copy
import gc
import hashlib
import weakref

import pytest
import torch
from indexes import MODEL
from torch import nn

from casn_plugin import CASN, GalleryIndex, Similarity
from casn_plugin.ranking import fingerprint as room
from casn_plugin.ranking.fingerprint import changes, fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """How often weights were hashed."""
    calls, genuine = [], room._hashed
    monkeypatch.setattr(room, "_hashed", lambda *given: calls.append(1) or genuine(*given))
    return calls


def pooled_forward(backbone, imgs):
    features = backbone(imgs).mean((2, 3))
    return features, features


def fresh(seed, pair_classifier=None) -> CASN:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=8), nn.BatchNorm2d(6))
    return CASN(
        backbone, forward=pooled_forward, input_size=(48, 24), hidden_dim=16, seed=seed,
        pair_classifier=pair_classifier,
    ).eval()  # fmt: skip


def by_hand(model) -> str:
    """The checksum of all names and bytes, as indexes have had it from the first."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name == "pair_classifier.initial":  # that came later, and nothing is computed from it
            continue
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_weights_are_hashed_once(tmp_path, hashed):
    model = fresh(5)
    index = GalleryIndex.create(tmp_path, model)
    index.add(model.encode(torch.rand(3, 3, 48, 24)))
    for _ in range(3):
        index.search(model, torch.rand(1, 3, 48, 24))
        model.train()
        model.eval()
        GalleryIndex(tmp_path).search(nn.DataParallel(model).module, torch.rand(1, 3, 48, 24))
    assert len(hashed) == 1 and fingerprint(model) == by_hand(model)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model) and len(hashed) == 2
    assert fingerprint(nn.DataParallel(model)) == fingerprint(model) and len(hashed) == 2


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(2, 3, 48, 24)).sum().backward()
    optimizer.step()


def fused_step(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, foreach=True)
    model(torch.rand(2, 3, 48, 24)).sum().backward()
    optimizer.step()


def first(model) -> nn.Parameter:
    return next(model.parameters())


def load_other_weights(model):
    model.load_state_dict(fresh(77).state_dict())


def assign_other_weights(model):
    model.load_state_dict(fresh(77).state_dict(), assign=True)


def write_in_place(model):
    with torch.no_grad():
        first(model).view(-1)[0] += 1e-3


def permute_in_place(model):
    weight = model.pair_classifier[0].weight  # whose rows are whole words: their sum stays
    before = room._sums([weight])
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert room._sums([weight]) == before


def write_through_data(model):
    first(model).data.view(-1)[0] += 1e-3


def write_through_numpy(model):
    first(model).detach().numpy().ravel()[0] += 1e-3


def give_other_data(model):
    first(model).data = torch.rand_like(first(model))


def replace_a_parameter(model):
    model.pair_classifier[0].weight = nn.Parameter(torch.rand_like(model.pair_classifier[0].weight))


def replace_a_layer(model):
    model.pair_classifier[2] = nn.Linear(16, 2)


def change_a_buffer(model):
    model.train()
    with torch.no_grad():
        model(torch.rand(4, 3, 48, 24))
    model.eval()


def average_in_place(model):
    with torch.no_grad():
        torch._foreach_lerp_([*model.parameters()], [*fresh(77).parameters()], 0.5)


def there_and_back(model):
    model.half().float()  # rounded, in memory that may be the same as before


def flip(model):
    model.flip = True


CHANGES = (
    step, fused_step, load_other_weights, assign_other_weights, write_in_place, permute_in_place,
    write_through_data, write_through_numpy, give_other_data, replace_a_parameter, replace_a_layer,
    change_a_buffer, average_in_place, there_and_back, flip,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(tmp_path, change):
    model = fresh(0)
    index = GalleryIndex.create(tmp_path, model)
    images = model.encode(torch.rand(3, 3, 48, 24))
    index.add(images)
    assert index.search(model, images[:1]).names
    before = fingerprint(model)
    change(model)
    found = fingerprint(model)
    assert found != before and found == fingerprint(copy.deepcopy(model))
    with pytest.raises(ValueError, match="created for a model with other weights"):
        index.search(model, images[:1])


def test_other_dtypes_and_back(hashed):
    model = fresh(8)
    before = fingerprint(model)
    assert fingerprint(model.double()) != before
    assert fingerprint(model.float()) == before  # nothing was rounded
    assert fingerprint(model.half()) != before
    assert fingerprint(model.to(memory_format=torch.channels_last).float()) != before
    assert len(hashed) == 5


def test_any_tensors_can_be_summed():
    """Odd numbers of bytes, memory that starts anywhere, other layouts, none at all."""
    for dtype in (torch.uint8, torch.int16, torch.float16, torch.float64, torch.bool):
        for start in (0, 1, 3):
            for size in (0, 1, 5, 8):
                holder = nn.Module()
                memory = torch.ones(16, dtype=dtype)
                holder.register_buffer("values", memory[start : start + size])
                before = fingerprint(holder)
                assert before == fingerprint(holder)
                if size:
                    memory.data[start + size - 1] = 0
                    assert before != fingerprint(holder)
    holder = nn.Module()
    holder.register_buffer("values", torch.rand(3, 4, 2, 5).permute(0, 3, 1, 2))
    before = fingerprint(holder)
    holder.values.data[1, 2, 3, 1] = 7
    assert before != fingerprint(holder)
    holder.register_buffer("more", torch.rand(()))
    assert before != fingerprint(holder)


def test_weights_made_in_inference_mode_are_known():
    with torch.inference_mode():
        layer = nn.Linear(3, 4)
        before = fingerprint(layer)
        layer.weight[0, 0] += 1
    assert fingerprint(layer) != before and changes(layer)


def test_a_similarity_has_another():
    with_similarity = fresh(0, Similarity())
    assert fingerprint(with_similarity) != by_hand(with_similarity)


def test_models_are_not_kept_alive():
    model = fresh(9)
    fingerprint(model)
    there = weakref.ref(model)
    assert there() in room._known
    del model
    gc.collect()
    assert there() is None


def test_what_is_no_model(unchecked):
    with pytest.raises(TypeError, match="model must be a Module, got str"):
        fingerprint("model")
    assert fingerprint(MODEL)
