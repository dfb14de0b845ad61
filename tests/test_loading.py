"""Pictures and batches of every form, read in one place."""

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TinyBackbone, tiny_forward

from casn_plugin import CASN, Preprocessing
from casn_plugin.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_pictures,
    encode_loader,
    image_loader,
    read_batch,
    read_item,
)


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
    ],
)
def test_batches_of_another_form_are_refused(unchecked, data, message):
    with pytest.raises(TypeError, match=message):
        read_batch(data)


def test_labels_are_one_an_image():
    with pytest.raises(ValueError, match=r"camids must be of shape \(2,\)"):
        read_batch((torch.rand(2, 3, 8, 4), [1, 2], [0]))


def test_images_are_dense(unchecked):
    with pytest.raises(TypeError, match="an image must be dense, got a tensor of layout"):
        Preprocessing((8, 4)).load(torch.rand(3, 8, 4).to_sparse())


def test_a_preprocessing_is_of_the_model_or_of_the_data_manager():
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24))
    assert Preprocessing().for_model(model).size == (48, 24)
    assert Preprocessing((8, 4)).for_model(model).size == (8, 4)
    with pytest.raises(ValueError, match="std positive, got"):
        Preprocessing(std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="must be three numbers"):
        Preprocessing(mean=(1.0, 0.0))


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.9))]
)
def test_pictures_are_the_images_before_normalization(mean, std):
    pictures = torch.rand(2, 3, 6, 4)
    imgs = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = Preprocessing(mean=mean, std=std).pictures(imgs)
    np.testing.assert_allclose(shown, pictures.permute(0, 2, 3, 1), atol=1e-6)
    assert Preprocessing().pictures(1e3 * imgs).max() <= 1


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


@pytest.fixture
def picture():
    values = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    return np.kron(values, np.ones((4, 4, 1), np.uint8))


LOAD = Preprocessing((64, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).load


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_eight_bits_is_read(picture, mode):
    image = PIL.Image.fromarray(picture)
    loaded, expected = LOAD(image.convert(mode)), LOAD(image.convert("L"))
    assert loaded.shape == (3, 64, 32) and abs(loaded.mean() - expected.mean()) < 0.04


@pytest.mark.parametrize("kind", ["I;16 png", "I;16 tiff", "I;16B", "I", "gray png of opencv"])
def test_sixteen_bits_are_as_good_as_eight(picture, tmp_path, kind):
    grey = picture[..., 0]
    deep, path = grey.astype(np.uint16) * 257, tmp_path / f"deep.{kind.split()[-1][:4]}"
    if kind == "I":
        image = PIL.Image.fromarray(deep.astype(np.int32))
        assert image.mode == "I"
    elif kind == "I;16B":
        image = PIL.Image.frombytes("I;16B", grey.shape[::-1], deep.astype(">u2").tobytes())
    else:
        path = path.with_suffix(".tiff" if "tiff" in kind else ".png")
        if "opencv" in kind:
            assert cv2.imwrite(str(path), deep)
        else:
            PIL.Image.fromarray(deep).save(path)
        image = path
    torch.testing.assert_close(LOAD(image), LOAD(PIL.Image.fromarray(grey)))
    if image is path:
        with pytest.raises(ValueError, match=r"1 of 1 pictures .*reader turns white"):
            check_pictures([str(path)])


def test_values_without_a_known_range_are_refused(picture):
    values = picture[..., 0].astype(np.float32)
    with pytest.raises(ValueError, match="float values has no known range"):
        LOAD(PIL.Image.fromarray(values))
    with pytest.raises(ValueError, match="expected a picture of 8 or 16 bits, got values from"):
        LOAD(PIL.Image.fromarray(values.astype(np.int32) * 100_000))


def test_damaged_and_turned_pictures_are_found_and_named(picture, tmp_path):
    paths = {name: str(tmp_path / name) for name in ("good.jpg", "cut.jpg", "turned.jpg", "no.jpg")}
    PIL.Image.fromarray(picture).save(paths["good.jpg"])
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(picture).save(paths["turned.jpg"], exif=exif)
    check_pictures([paths["good.jpg"]] * 3, progress=True)
    with pytest.raises(ValueError) as found:
        check_pictures(paths.values())
    said = str(found.value)
    assert said.startswith("3 of 4 pictures can't be read: ") and "good.jpg" not in said
    assert all(paths[name] in said for name in ("cut.jpg", "turned.jpg", "no.jpg"))
    assert LOAD(paths["turned.jpg"]).shape == (3, 64, 32)  # upright here
    with pytest.raises(OSError, match=r"cut\.jpg can't be read as a picture"):
        LOAD(paths["cut.jpg"])
    with pytest.raises(FileNotFoundError):
        LOAD(paths["no.jpg"])
