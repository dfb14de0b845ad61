"""Manifests of an index that nobody wrote: refused by name, or the index as it is; all inside."""

import copy
import hashlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from subjects import tiny_casn
from tqdm import tqdm

from casn_plugin import Encoding, GalleryIndex

HUGE = 10**400
WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 3, 4, 2**31, 2**63, 2**64, 10**30, HUGE, -HUGE, 1.0, 0.5, 1e308,
    float("nan"), float("inf"), "", "x", "\0", "é\ud800", "\u202e", "𝟙", "１", "float32",
    "float8_e5m2", "a" * 64, "A" * 64, "a" * 10**6, [], [0], [0, 0], [-1], [True], [1.0], ["0"],
    [None], [HUGE], [[]], list(range(9999)), {}, {"a": 1}, {"": {}}, ["float32", -6],
    ["float32", 6, 3, 6], ["float32", 2**40, 2, 2], ["float32", 0, 1, 1], "../secret",
]  # fmt: skip
PATHS = [
    "../{}", "../../{}", "a/../../{}", "./{}", "{}/", "//{}", "/etc/passwd", "/dev/zero",
    "..", ".", "", "..\\{}", "{}\n", "{}\0", "\0{}", " {}", "{} ", "index.json", "index.lock",
    "C:{}", "~/{}", "file:{}", "%2e%2e/{}", "．．/{}", "{}.safetensors", "link", "fifo",
]  # fmt: skip


def forged(content: dict[str, Any]) -> bytes:
    """Returns a manifest whose checksum fits, however wrong it is."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields where in a manifest there is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Returns a manifest with another value at a place; with Ellipsis, without that."""
    content = copy.deepcopy(content)
    owner: Any = content
    for key in path[:-1]:
        owner = owner[key]
    if isinstance(owner, dict) and not isinstance(path[-1], str):
        raise TypeError("no place for a number")
    if value is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return content


def crafted(genuine: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a manifest, and what it is now."""
    content, shards = copy.deepcopy(genuine), genuine["shards"]
    where = rng.choice([path for path in places(genuine) if path != ("checksum",)])
    how = rng.choice(("value", "value", "value", "two", "path", "path", "shards", "nest", "bytes"))
    if how in ("value", "two"):
        for _ in range(1 + (how == "two")):
            value = rng.choice([*WRONG, ...])
            with suppress(KeyError, IndexError, TypeError):  # it is in what is gone already
                content = changed(content, where, value)
            where = rng.choice([path for path in places(genuine) if path != ("checksum",)])
        return f"{how} {where} {value!r:.30}", forged(content)
    if how == "path":
        shard = rng.choice(content["shards"])
        shard["file"] = rng.choice(PATHS).format(shard["file"])
        return f"path {shard['file']!r}", forged(content)
    if how == "shards":  # twice, in another order, of another's checksum, fewer
        some = [copy.deepcopy(rng.choice(shards)) for _ in range(rng.randint(0, 5))]
        if some and rng.random() < 0.5:
            some[0]["sha256"] = rng.choice(shards)["sha256"]
        if some and rng.random() < 0.3:
            some[-1]["removed"] = sorted(rng.sample(range(4), rng.randint(0, 4)))
        return "shards", forged({**content, "shards": some, "added": 10**6})
    if how == "nest":
        deep = rng.choice((100, 900, 5000, 100_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        text = opening * deep + "1" + closing * (deep if rng.random() < 0.5 else 0)
        return f"nested {deep}", json.dumps(genuine).replace('"basis"', text, 1).encode()
    data = bytearray(json.dumps(genuine, indent=rng.choice((None, 1))).encode())
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"))
    return f"bytes {encoding}", bytes(data).decode("latin-1").encode(encoding)


class Opened:
    """Which files this process opens: Python's own, and so all that are read before others'."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.paths is not None and event == "open" and isinstance(args[0], str | bytes):
            self.paths.append(os.fsdecode(args[0]))


def row_of(index: GalleryIndex) -> dict[str, tuple[Any, ...]]:
    """Returns all that an index holds of each name, none of which may be there twice."""
    assert len(set(index.names)) == len(index.names), "a name is there twice"
    maps, features = (index[:].maps, index[:].features) if len(index) else ([], [])
    return {
        name: (int(pid), int(camid), maps[row].tolist(), features[row].tolist())
        for row, (name, pid, camid) in enumerate(
            zip(index.names, index.pids, index.camids, strict=True)
        )
    }


def three_shards(folder: Path) -> GalleryIndex:
    """Returns an index of three shards."""
    index = GalleryIndex.create(folder, tiny_casn())
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        part = Encoding(
            torch.rand(4, 6, generator=generator), torch.rand(4, 6, 3, 2, generator=generator)
        )
        names = [f"{number}{row}" for row in range(4)]
        index.add(part, names=names, pids=range(4), camids=[number] * 4)
    return index


def manifests(number: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Returns how many manifests were refused, and what was found.

    The first ones are a small manifest that is cut after every byte.
    """
    rng, findings, opened = random.Random(seed), [], Opened()
    counted: Counter[str] = Counter(refused=0, accepted=0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root).resolve() / "index"
        index = three_shards(folder)
        genuine = row_of(index)
        index.remove([1])
        path = folder / "index.json"
        content = json.loads(path.read_bytes())
        outside(folder, content)
        small = Path(root).resolve() / "small"
        GalleryIndex.create(small, tiny_casn())
        whole = (small / "index.json").read_bytes()
        cut = [("cut", small, whole[:end]) for end in range(len(whole))]
        cut += [("links", folder, b"")] * 2
        for turn in tqdm(range(len(cut) + number), desc="manifests", disable=None):
            if turn < len(cut):
                name, place, data = cut[turn]
            else:
                (name, data), place = crafted(content, rng), folder
            before = (place / "index.json").read_bytes()
            if name == "links":
                link(folder, content, turn % 2 == 0)
            else:
                (place / "index.json").write_bytes(data)
            said = judged(place, genuine, opened, verify=rng.random() < 0.7)
            counted["refused" if said is None else "accepted"] += said != "other"
            if said not in (None, ""):
                findings.append(f"{name}: {said}")
            if name == "links":
                unlink(folder, content)
            (place / "index.json").unlink()
            (place / "index.json").write_bytes(before)
    figures = {"manifests": len(cut) + number, **counted, "findings": len(findings)}
    return figures, findings


def outside(folder: Path, content: dict[str, Any]) -> None:
    """Puts what must not be opened around an index: shards, a link and a pipe."""
    for shard in content["shards"]:
        data = (folder / shard["file"]).read_bytes()
        (folder.parent / shard["file"]).write_bytes(data)
    (folder / "link").symlink_to(folder.parent / content["shards"][0]["file"])
    os.mkfifo(folder / "fifo")


def link(folder: Path, content: dict[str, Any], manifest: bool) -> None:
    """Makes the manifest or a shard a link to the same file outside."""
    name = "index.json" if manifest else content["shards"][0]["file"]
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def unlink(folder: Path, content: dict[str, Any]) -> None:
    """Undoes :func:`link`."""
    for name in ("index.json", content["shards"][0]["file"]):
        if (folder / name).is_symlink():
            (folder / name).unlink()
            (folder / name).write_bytes((folder.parent / name).read_bytes())


def judged(folder: Path, genuine: dict[str, Any], opened: Opened, verify: bool) -> str | None:
    """Returns None for an index that was refused, "" for one that is as it was, else a finding."""
    said: str | None = None
    opened.paths = []
    try:
        rows = row_of(GalleryIndex(folder, verify=verify))
        wrong = [name for name, row in rows.items() if genuine.get(name) != row]
        said = f"accepted with another meaning: {wrong[:3]}" if wrong else ""
    except (ValueError, FileNotFoundError) as error:
        names = (folder.name, ".safetensors", "index.json")
        if not str(error).count(str(folder)) or not any(each in str(error) for each in names):
            said = f"not named: {error!s:.100}"
    except AssertionError as error:
        said = str(error)
    except Exception as error:
        said = f"raw {type(error).__name__}: {error!s:.100}"
    paths, opened.paths = opened.paths, None
    away = [each for each in paths if Path(os.path.realpath(each)).parent != folder]
    away = [each for each in away if not each.endswith((".py", ".pyc", ".so"))]
    return f"opened outside of the folder: {away[:2]}" if away else said


if __name__ == "__main__":
    torch.set_num_threads(1)
    totals, found = manifests(int(sys.argv[1]), int(sys.argv[2]))
    for text, count in sorted(Counter(found).items()):
        print(count, text)
    print(totals)
    sys.exit(bool(found))
