"""Pictures and batches of every form, read in one place."""

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from torch.utils.data import DataLoader, IterableDataset

from casn_plugin import CASN, Preprocessing
from casn_plugin.loading import encode_loader, image_loader, read_batch, read_item


def test_batches_are_encoded_one_after_the_other(unchecked):
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24))
    imgs = torch.rand(5, 3, 64, 32)
    batches = [(imgs[:3], torch.tensor([1, 2, 3]), [0, 1, 0]), (imgs[3:], [7, 8], np.array([2, 2]))]
    encoding, pids, camids = encode_loader(model, batches)
    assert pids.tolist() == [1, 2, 3, 7, 8] and camids.tolist() == [0, 1, 0, 2, 2]
    whole = model.encode(imgs)
    torch.testing.assert_close(encoding.features, whole.features)
    torch.testing.assert_close(encoding.maps, whole.maps)
    unlabelled = encode_loader(model, [imgs, (imgs[:2], [7, None])])
    assert unlabelled.pids.tolist() == [-1] * 5 + [7, -1] and set(unlabelled.camids) == {-1}
    with pytest.raises(TypeError, match="pids must be integers, got float"):
        encode_loader(model, [(imgs[:2], [0.5, 1.0])])
    with pytest.raises(ValueError, match="at least one encoding"):
        encode_loader(model, [])


def test_batches_are_read_whatever_their_form():
    imgs, pids, camids = torch.rand(2, 3, 8, 4), torch.tensor([7, 9]), np.array([0, 1])
    whole = {"img": imgs, "impath": ["a", "b"], "pid": pids, "camid": camids, "dsetid": pids}
    assert read_batch(whole)[1:] == (["a", "b"], [7, 9], [0, 1])
    assert read_batch({"img": imgs})[1:] == (None, None, None)
    assert read_batch(imgs)[1:] == read_batch((imgs,))[1:] == (None, None, None)
    assert read_batch([imgs, pids])[1:] == (None, [7, 9], None)
    assert read_batch((imgs, pids, camids))[1:] == (None, [7, 9], [0, 1])
    assert all(read_batch(each).imgs is imgs for each in (whole, imgs, [imgs, pids]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(3, 8, 4), "must give batches of images .* got Tensor"),
        ({"image": torch.rand(2, 3, 8, 4)}, "got dict"),
        ([], "got list"),
        ((torch.rand(2, 3, 8, 4), [1, 2], [0, 0], ["a", "b"]), "got a tuple of 4"),
        ((torch.rand(2, 3, 8, 4), torch.ones(2).long().to_sparse()), "of layout torch.sparse_coo"),
        ((torch.rand(2, 3, 8, 4), ["a", "b"]), "pids must be integers, got <U1"),
        ({"img": torch.rand(2, 3, 8, 4), "impath": torch.arange(2)}, "names .* got Tensor in them"),
        ({"img": torch.rand(2, 3, 8, 4), "impath": "ab"}, "names .* must be a list of text"),
        ({"img": torch.rand(2, 3, 8, 4), "impath": 7}, "names .* must be a list of text.* got 7"),
    ],
)
def test_batches_of_another_form_are_refused(unchecked, data, message):
    with pytest.raises(TypeError, match=message):
        read_batch(data)


def test_labels_are_one_an_image():
    with pytest.raises(ValueError, match=r"camids must be of shape \(2,\)"):
        read_batch((torch.rand(2, 3, 8, 4), [1, 2], [0]))
    with pytest.raises(ValueError, match=r"names .* must be 2, one an image, got 1"):
        read_batch({"img": torch.rand(2, 3, 8, 4), "impath": ["a"]})


def test_a_loader_goes_through_its_data_in_order():
    people = [(torch.rand(3, 8, 4), pid, 0) for pid in range(40)]
    inner = image_loader("query", people, Preprocessing((8, 4)))
    shuffled = torch.utils.data.DataLoader(inner.dataset, batch_size=7, shuffle=True)
    again = image_loader("query", shuffled, Preprocessing((8, 4)))
    for loader in (inner, again):
        assert [pid for batch in loader for pid in batch["pid"].tolist()] == list(range(40))


def test_items_are_read_whatever_their_form(unchecked):
    img = torch.rand(3, 8, 4)
    whole = {"img": img, "impath": "a", "pid": 7, "camid": torch.tensor(2)}
    assert read_item(whole)[1:] == (7, 2) and read_item({"img": img})[1:] == (-1, -1)
    assert read_item((img, 7))[1:] == (7, -1) and read_item(img).img is img
    assert read_item([img, None, np.int64(3)])[1:] == (-1, 3)
    for bad in (img[0], {"pid": 7}, ("a.jpg", 7), [], None):
        with pytest.raises(TypeError, match="must give an image"):
            read_item(bad)
    with pytest.raises(TypeError, match="pids must be integers"):
        read_item((img, 0.5))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(3, 8, 4), 7, 0)])


def test_what_is_read_again_must_be_numbered():
    with pytest.raises(TypeError, match="query must be a loader of .* got one of Stream, which"):
        image_loader("query", DataLoader(Stream()), Preprocessing((8, 4)))
