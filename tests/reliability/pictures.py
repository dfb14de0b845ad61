"""Pictures of every mode, depth, format and orientation, whole and cut: read right or refused."""

import colorsys
import io
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from casn_plugin import Preprocessing
from casn_plugin.picturefiles import check_pictures

BLOCKS, BLOCK, LIMIT = (8, 4), 8, 10
SIZE = (BLOCKS[0] * BLOCK, BLOCKS[1] * BLOCK)
LOAD = Preprocessing(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).load
GREY = np.array([0.299, 0.587, 0.114])
Pixels = np.ndarray
"""Values 0 ... 255 of what a picture shows; by formulas that are not PIL's."""


class HangsError(BaseException):
    """A picture was not read in time; nothing catches it."""


def blocks(rng: random.Random) -> Pixels:
    """Returns an RGB picture of blocks in 12 colours, of which no turned one looks like it."""
    chance = np.random.default_rng(rng.getrandbits(32))
    colours = chance.integers(0, 256, (12, 3))
    return np.kron(colours[chance.integers(0, 12, BLOCKS)], np.ones((BLOCK, BLOCK, 1), int))


def each_pixel(formula: Callable[[tuple[float, ...]], tuple[float, ...]], rgb: Pixels) -> Pixels:
    """Returns what a formula for colours in [0, 1] makes of a picture."""
    colours, places = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    made = np.array([formula(tuple(colour / 255)) for colour in colours])
    return (made[places.ravel()].reshape(*rgb.shape[:2], -1) * 255).round()


def from_bytes(mode: str, values: Pixels) -> PIL.Image.Image:
    """Returns a picture of values that lie in memory as its mode has them."""
    return PIL.Image.frombytes(mode, values.shape[1::-1], np.ascontiguousarray(values).tobytes())


def grey_of(rgb: Pixels) -> Pixels:
    """Returns the luma of a picture in 8 bits, thrice."""
    return np.repeat((rgb @ GREY).round()[..., None], 3, axis=2)


def with_alpha(values: Pixels, rng: random.Random) -> tuple[Pixels, Pixels]:
    """Returns a picture with transparency, half to none, and as one of premultiplied colours."""
    chance = np.random.default_rng(rng.getrandbits(32))
    alpha = chance.integers(128, 256, (values.shape[0] // BLOCK, values.shape[1] // BLOCK))
    alpha = np.kron(alpha, np.ones((BLOCK, BLOCK), int))[..., None]
    both = [np.concatenate([each, alpha], 2) for each in (values, (values * alpha / 255).round())]
    return both[0].astype(np.uint8), both[1].astype(np.uint8)


def palette(rgb: Pixels, rng: random.Random) -> PIL.Image.Image:
    """Returns a picture whose pixels are numbers of colours; one colour may be transparent."""
    colours, places = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    picture = from_bytes("P", places.reshape(rgb.shape[:2]).astype(np.uint8))
    picture.putpalette(colours.astype(np.uint8).tobytes())
    if rng.random() < 0.3:
        picture.info["transparency"] = rng.randrange(len(colours))
    return picture


def cmyk(rgb: Pixels) -> Pixels:
    """Returns inks, with black where all three colours have it."""
    black = 255 - rgb.max(2, keepdims=True)
    inks = 255 * (255 - rgb - black) / np.maximum(255 - black, 1)
    return np.concatenate([inks, black], 2).round().astype(np.uint8)


def lab(rgb: Pixels) -> Pixels:
    """Returns CIE L*a*b* of an sRGB picture under D50, in 8 bits, as TIFF has it."""
    linear = np.where(rgb / 255 > 0.04045, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    to_d50 = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06062], [0.01392, 0.09708, 0.71410]]
    xyz = linear @ np.array(to_d50).T / [0.96422, 1.0, 0.82521]
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29), 2, 0)
    values = np.stack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)], 2).round()
    return values.astype(np.int64).astype(np.uint8)


def ycbcr(rgb: Pixels) -> Pixels:
    """Returns luma and chroma as JPEG has them."""
    luma = rgb @ GREY
    blue, red = (rgb[..., 2] - luma) / 1.772 + 128, (rgb[..., 0] - luma) / 1.402 + 128
    return np.stack([luma, blue, red], 2).round().clip(0, 255).astype(np.uint8)


def deep(mode: str, rgb: Pixels, rng: random.Random) -> PIL.Image.Image:
    """Returns a grey picture of 16 bits, or of 32 of which some are used."""
    values = grey_of(rgb)[..., 0] * 257
    dtype = {"I": "<i4", "F": "<f4", "I;16B": ">u2"}.get(mode, "<u2")
    values = values / rng.choice([1, 257] if mode == "I" else [1, 257, 65535]) ** (mode in "IF")
    return from_bytes(mode, values.astype(dtype))


def made(mode: str, rgb: Pixels, rng: random.Random) -> PIL.Image.Image:
    """Returns a picture of one of PIL's modes."""
    grey = grey_of(rgb)[..., :1]
    if mode in DEEP:
        return deep(mode, rgb, rng)
    if mode == "1":
        light = np.packbits(grey[..., 0] > 127, axis=1)
        return PIL.Image.frombytes("1", rgb.shape[1::-1], light.tobytes())
    if mode in ("P", "PA"):
        return palette(rgb, rng).convert(mode)
    values = {
        "RGB": lambda: rgb, "RGBX": lambda: np.dstack([rgb, 0 * grey]), "L": lambda: grey,
        "RGBA": lambda: with_alpha(rgb, rng)[0], "RGBa": lambda: with_alpha(rgb, rng)[1],
        "LA": lambda: with_alpha(grey, rng)[0], "La": lambda: with_alpha(grey, rng)[1],
        "CMYK": lambda: cmyk(rgb), "YCbCr": lambda: ycbcr(rgb),
        "HSV": lambda: each_pixel(lambda colour: colorsys.rgb_to_hsv(*colour), rgb),
        "LAB": lambda: lab(rgb),
    }[mode]  # fmt: skip
    return from_bytes(mode, values().astype(np.uint8))


def shown_as(mode: str, rgb: Pixels) -> Pixels:
    """Returns what a mode can show of a picture."""
    if mode == "1":
        return np.where(grey_of(rgb) > 127, 255, 0)
    return grey_of(rgb) if mode in (*DEEP, "L", "LA", "La") else rgb


def stored(pixels: Pixels, orientation: int) -> Pixels:
    """Returns how pixels lie in a file whose EXIF says that they are to be turned so."""
    turn: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: np.rot90(p, -1),
    }  # fmt: skip
    return np.ascontiguousarray(turn[orientation](pixels))


DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MODES = (
    *DEEP, "1", "CMYK", "HSV", "L", "LA", "LAB", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa",
    "YCbCr",
)  # fmt: skip
KEEPS_DEPTH = ("TIFF", "PNG", "PPM", "IM", "SPIDER", "JPEG2000")
"""The formats that PIL writes deep pictures to as they are, if at all; others it makes white."""
FORMATS: dict[str, list[dict[str, Any]]] = {
    "PNG": [{}, {"optimize": True}], "BMP": [{}], "DIB": [{}], "GIF": [{}], "PPM": [{}],
    "TGA": [{}, {"compression": "tga_rle"}], "SGI": [{}], "PCX": [{}], "IM": [{}],
    "ICO": [{"sizes": [SIZE[::-1]]}],
    "DDS": [{}], "MSP": [{}], "XBM": [{}], "SPIDER": [{}], "QOI": [{}], "EPS": [{}],
    "TIFF": [{"compression": each} for each in (
        None, "tiff_lzw", "tiff_deflate", "packbits", "group4", "jpeg",
    )],
    "JPEG": [{"quality": 95, "subsampling": 0}, {"quality": 95, "progressive": True}],
    "MPO": [{"quality": 95, "subsampling": 0}], "JPEG2000": [{}, {"irreversible": True}],
    "WEBP": [{"lossless": True, "exact": True}, {"quality": 95, "exact": True}],
    "AVIF": [{"quality": 95}],
}  # fmt: skip
TURNED = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "AVIF")
"""The formats in which an EXIF orientation is kept."""


def saved(rng: random.Random) -> tuple[str, bytes, Pixels]:
    """Returns what a file is that PIL has written, the file, and what it shows."""
    while True:
        mode, kind = rng.choice(MODES), rng.choice(sorted(FORMATS))
        if mode in DEEP and kind not in KEEPS_DEPTH:
            continue
        orientation = rng.randint(1, 8) if kind in TURNED else 1
        truth = blocks(rng)
        picture = made(mode, stored(truth, orientation), rng)
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        options = {**rng.choice(FORMATS[kind]), **({"exif": exif} if orientation > 1 else {})}
        file = io.BytesIO()
        with suppress(Exception):  # not every format has every mode
            picture.save(file, kind, **options)
            name = f"{mode} {kind} {orientation} {options.get('compression', '')}"
            return name, file.getvalue(), shown_as(mode, truth)


def png(rng: random.Random) -> tuple[str, bytes, Pixels]:
    """Returns a PNG of any depth and colour type, which no library has written."""
    truth = blocks(rng)
    grey = grey_of(truth)
    colour = rng.choice((0, 2, 3, 4, 6))
    bits = rng.choice({0: (1, 2, 4, 8, 16), 3: (4, 8)}.get(colour, (8, 16)))
    chunks = []
    if colour == 3:
        colours, places = np.unique(truth.reshape(-1, 3), axis=0, return_inverse=True)
        values, shown = places.reshape(*SIZE, 1), truth
        chunks.append((b"PLTE", colours.astype(np.uint8).tobytes()))
    else:
        most = 2**bits - 1
        shown = truth if colour in (2, 6) else grey
        values = (shown[..., : 3 if colour in (2, 6) else 1] / 255 * most).round().astype(int)
        shown = values.repeat(3 // values.shape[2], 2) / most * 255
        if colour in (4, 6):
            values = np.dstack([values, np.full(SIZE, rng.randint(1, most))])
    flat = values.reshape(SIZE[0], -1)
    if bits == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(SIZE[0], -1)
    elif bits == 8:
        rows = flat.astype(np.uint8)
    else:
        single = (flat[..., None] >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(single.reshape(SIZE[0], -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(rows))
    chunks.insert(0, (b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], bits, colour, 0, 0, 0)))
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return f"png of {bits} bits, colour type {colour}", data, shown


def tiff(rng: random.Random) -> tuple[str, bytes, Pixels]:
    """Returns a TIFF of any depth, byte order and sign, which no library has written."""
    truth, order = blocks(rng), rng.choice("<>")
    bits, photometric = rng.choice((1, 2, 4, 8, 12, 16, 32)), rng.choice((0, 1, 1, 2))
    signed = bits in (16, 32) and rng.random() < 0.3
    bits = max(bits, 8) if photometric == 2 else bits
    most = 2 ** (bits - signed) - 1
    shown = truth if photometric == 2 else grey_of(truth)
    samples = 3 if photometric == 2 else 1
    values = (shown[..., :samples] / 255 * most).round().astype(np.int64)
    shown = values.repeat(3 // samples, 2) / most * 255
    values = most - values if photometric == 0 else values
    flat = values.reshape(SIZE[0], -1)
    if bits in (8, 16, 32):
        rows = flat.astype(f"{order}u{bits // 8}").tobytes()
    else:  # from the highest bit on, whatever the order of bytes
        single = (flat[..., None] >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(single.reshape(SIZE[0], -1), axis=1).tobytes()
    tags = [
        (256, SIZE[1]), (257, SIZE[0]), (258, bits), (259, 1), (262, photometric), (273, 8),
        (277, samples), (278, SIZE[0]), (279, len(rows)), (339, 1 + signed),
    ]  # fmt: skip
    place = 8 + len(rows)
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    if samples == 3:  # three depths and signs, beside the table
        beside = place + 2 + 12 * len(tags) + 4
        entries = b"".join(
            struct.pack(f"{order}HHII", tag, 3, 3, beside + 6 * (tag == 339))
            if tag in (258, 339) else struct.pack(f"{order}HHII", tag, 4, 1, value)
            for tag, value in tags
        )  # fmt: skip
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, place) + rows
    data += struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    if samples == 3:
        data += struct.pack(f"{order}6H", *3 * [bits], *3 * [1 + signed])
    name = f"tiff {order} of {'-' * signed}{bits} bits, photometric {photometric}"
    return name, data, shown


def netpbm(rng: random.Random) -> tuple[str, bytes, Pixels]:
    """Returns a PGM or PPM, binary or text, of any highest value."""
    truth, kind = blocks(rng), rng.choice((2, 3, 5, 6))
    most = rng.choice((1, 15, 100, 255, 256, 1023, 4095, 65535))
    shown = truth if kind in (3, 6) else grey_of(truth)[..., :1]
    values = (shown / 255 * most).round().astype(int)
    head = f"P{kind}\n{SIZE[1]} {SIZE[0]}\n{most}\n".encode()
    if kind < 4:
        body = " ".join(map(str, values.ravel())).encode()
    else:
        body = values.astype(">u2" if most > 255 else "u1").tobytes()
    shown = values.repeat(3 // values.shape[2], 2) / most * 255
    return f"P{kind} up to {most}", head + body, shown


@contextmanager
def in_time() -> Any:
    """Raises :class:`HangsError` after some seconds."""

    def late(*_: Any) -> None:
        raise HangsError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def off(got: Pixels, shown: Pixels) -> float:
    """Returns how far a picture is from what it shows, in the mean, of 1."""
    return float(np.abs(np.asarray(got, float) - shown / 255).mean())


def torchreids(path: Path) -> Pixels:
    """Returns what torchreid's reader makes of a file, which has no end where it fails."""
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize(SIZE[::-1])) / 255


def outcome(path: Path, shown: Pixels, broken: str) -> tuple[str, str | None]:
    """Returns what has become of a file, and what is wrong with that, if anything."""
    tolerance = 0.06
    try:
        with in_time():
            got = LOAD(path).permute(1, 2, 0).numpy()
        said, wrong = "right", None
        if broken != "flip" and off(got, shown) > tolerance:
            wrong = f"wrong in silence: off by {off(got, shown):.2f}, mean {got.mean():.2f}"
    except (ValueError, OSError) as error:
        said, wrong = "refused", None if str(path) in str(error) else f"not named: {error}"
    except HangsError:
        return "raw", "hangs"
    except Exception as error:
        return "raw", f"raw {type(error).__name__}: {error}"
    try:
        with in_time():
            check_pictures([str(path)])
            if broken != "flip" and off(torchreids(path), shown) > tolerance:
                wrong = wrong or "check_pictures lets it pass, torchreid reads it wrongly"
    except ValueError as error:
        wrong = wrong or (None if str(path) in str(error) else f"not named: {error}")
    except HangsError:
        return "raw", "check_pictures hangs"
    except Exception as error:
        return "raw", f"raw {type(error).__name__} of check_pictures: {error}"
    if wrong is None and said == "refused" and broken == "no":
        with suppress(Exception):  # a refusal is right, but one that is not needed costs pictures
            if off(torchreids(path), shown) < tolerance:
                said = "refused, though PIL is right"
    return said, wrong


def pictures(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns how many pictures were read right or refused, and what was found."""
    rng, findings = random.Random(seed), []
    counted: Counter[str] = Counter()
    warnings.simplefilter("ignore")
    slowest = 0.0
    with tempfile.TemporaryDirectory() as root:
        for turn in tqdm(range(number), desc="pictures", disable=None):
            make = rng.choices((saved, png, tiff, netpbm), (6, 1, 1, 1))[0]
            name, data, shown = make(rng)
            broken = rng.choices(("no", "cut", "flip"), (5, 3, 2))[0]
            if broken == "cut":
                data = data[: rng.randrange(len(data))]
            elif broken == "flip":
                changed = bytearray(data)
                for _ in range(rng.choice((1, 1, 4, 30))):
                    place = rng.choice((min(len(data), 300), len(data)))
                    changed[rng.randrange(place)] = rng.randrange(256)
                data = bytes(changed)
            path = Path(root, f"picture-{turn}.{rng.choice(('jpg', 'png', 'bmp', 'tif'))}")
            path.write_bytes(data)
            began = time.monotonic()
            said, wrong = outcome(path, shown, broken)
            slowest = max(slowest, time.monotonic() - began)
            counted[said] += 1
            if wrong is not None:
                findings.append(f"{name}, {broken}: {wrong.replace(str(path), 'PATH')[:200]}")
            path.unlink()
    silent = sum(": wrong in silence" in each or "wrongly" in each for each in findings)
    figures = {
        "pictures": number, **dict(sorted(counted.items())), "silent": silent,
        "findings": len(findings), "slowest in s": round(slowest),
    }  # fmt: skip
    return figures, findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, found = pictures(int(sys.argv[1]), int(sys.argv[2]))
    for text, count in sorted(Counter(found).items()):
        print(count, text)
    print(totals)
    sys.exit(bool(found))
