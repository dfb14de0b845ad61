"""Picture files of every mode and depth, upright; damaged ones by name."""

import builtins
import errno
import io
import os

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from casn_plugin import Preprocessing
from casn_plugin.picturefiles import FORMATS, check_pictures, read_picture


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
    with pytest.raises(ValueError, match="no known range .* got mode 'F'"):
        LOAD(PIL.Image.fromarray(values))
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got values from"):
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


def test_what_has_no_certain_depth_is_refused(picture, tmp_path):
    grey = picture[..., 0].astype(np.int32)
    with pytest.raises(ValueError, match="16 bits or 8. got mode 'I' and no value above"):
        read_picture(PIL.Image.fromarray(grey))
    assert read_picture(PIL.Image.fromarray(0 * grey)).getextrema() == ((0, 0),) * 3
    path = tmp_path / "signed.tif"
    PIL.Image.fromarray(grey * 100).save(path)
    with pytest.raises(ValueError, match=r"signed\.tif has no known range .* TIFF of .*32"):
        read_picture(path)


def test_files_are_turned_upright_however_they_lie_in_memory(picture, tmp_path):
    """Pillow maps a raw CMYK TIFF that it opens by its path, and does not turn it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = PIL.Image.fromarray(np.ascontiguousarray(np.rot90(picture))).convert("CMYK")
    for name in ("a.tif", "a.png", "a.jpg"):
        image = turned if name == "a.tif" else turned.convert("RGB")
        image.save(tmp_path / name, exif=exif)
        got = np.asarray(read_picture(tmp_path / name)).astype(int)
        assert got.shape == picture.shape and abs(got - picture).mean() < 25, name


@pytest.mark.parametrize("name", ["a.eps", "a.pcx", "a.tga"])
def test_rare_formats_are_refused_by_name(picture, tmp_path, name):
    """PostScript is a program; the others do not tell that they are cut."""
    PIL.Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "a.jpg")
    with pytest.raises(OSError, match=r"a\.jpg can't be read .*: expected one of AVIF, .* got"):
        read_picture(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"1 of 1 pictures .*a\.jpg .expected one of AVIF"):
        check_pictures([str(tmp_path / "a.jpg")])


def test_every_error_of_a_format_is_an_oserror_by_name(picture, tmp_path):
    path = tmp_path / "cut.ppm"
    path.write_bytes(b"P3 4 4 255\n1 2 3")  # Pillow: ValueError
    with pytest.raises(OSError, match=r"cut\.ppm can't be read as a picture: not enough image"):
        read_picture(path)
    with pytest.raises(OSError, match="the picture can't be read as a picture"):
        read_picture(PIL.Image.new("La", (4, 4)))


def test_what_the_system_refuses_is_told_from_damage(picture, tmp_path, monkeypatch):
    """By its errno: of the content of such a file nothing is known."""
    PIL.Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    os.mkfifo(tmp_path / "b.png")
    for name, number in (("no.png", errno.ENOENT), (".", errno.ENXIO), ("b.png", errno.ENXIO)):
        with pytest.raises(OSError) as found:
            read_picture(tmp_path / name)
        assert found.value.errno == number and found.value.filename == str(tmp_path / name)
    with pytest.raises(ValueError, match=r"1 of 2 pictures .*b\.png .*expected a regular file"):
        check_pictures([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    with pytest.raises(OSError, match=r"cut\.png can't be read") as found:
        read_picture(tmp_path / "cut.png")
    assert found.value.errno is None
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(OSError, match=r"exceeds limit .*a\.png") as found:
        read_picture(tmp_path / "a.png")
    assert found.value.errno == errno.ENOMEM


@pytest.mark.parametrize("name", ["a.png", "a.jp2", "a.tif"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # so Pillow says that it lacks tags of a TIFF
def test_an_error_of_reading_is_no_damage(tmp_path, monkeypatch, name):
    """Whatever a decoder makes of it, at the first part of a file or at the next."""
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / name)

    class Failing(io.FileIO):
        left = 0

        def readinto(self, buffer):
            if not Failing.left:
                raise OSError(errno.EIO, "broken")
            Failing.left -= 1
            return super().readinto(buffer)

        def readall(self):
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(builtins, "open", lambda path, *_: io.BufferedReader(Failing(path), 1000))
    for left in range(2):
        Failing.left = left
        with pytest.raises(OSError, match="broken.*a") as found:
            read_picture(tmp_path / name)
        assert found.value.errno == errno.EIO


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_from_a_file(tmp_path, kind):
    PIL.Image.init()  # so each of Pillow's formats, rare ones too, looks at it (one by lines)
    noise = np.random.default_rng(1).integers(0, 256, (48, 24, 3), dtype=np.uint8)
    image, path = PIL.Image.fromarray(noise), tmp_path / "a.png"
    try:
        image.save(path, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {kind}")
    expected = np.asarray(PIL.Image.open(path).convert("RGB"))
    assert np.array_equal(np.asarray(read_picture(path)), expected)
