"""Models, images and indexes that the tests of index, contents and shards share."""

import hashlib
import json
from pathlib import Path

import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn
from torch.utils.data import Dataset

from casn_plugin import CASN, Encoding, GalleryIndex
from casn_plugin.encoding import part_embedding
from casn_plugin.ranking.company import LOCK
from casn_plugin.ranking.manifest import Entry, Manifest

DIM, SIZE = 4, (3, 2)
KINDS = {"basis": (DIM, DIM), "activations": (2 * DIM, DIM)}


def tiny(seed=0) -> CASN:
    torch.manual_seed(seed)
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=16).eval()


def parts_forward(backbone, imgs):
    features = part_embedding(backbone(imgs), 3)
    return features, features


def pcb() -> CASN:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3, stride=8), nn.ReLU()))
    return CASN(backbone, forward=parts_forward, input_size=(48, 24), hidden_dim=16).eval()


MODELS = {"basis": tiny, "activations": pcb}
MODEL = tiny()


def encoding(kind, n, seed=0, size=SIZE, dtype=torch.float32) -> Encoding:
    generator = torch.Generator().manual_seed(seed)
    dim, channels = KINDS[kind]
    features = torch.rand(n, dim, generator=generator, dtype=dtype)
    return Encoding(
        features, **{kind: torch.rand(n, channels, *size, generator=generator, dtype=dtype)}
    )


def assert_same(first: Encoding, second: Encoding):
    assert (first.basis is None) == (second.basis is None)
    for one, two in ((first.features, second.features), (first.maps, second.maps)):
        assert one.shape == two.shape and one.dtype == two.dtype
        assert torch.equal(one, two)


def files(folder) -> set[str]:
    """Returns the names of all files but the lock, which stays once something has been changed."""
    return {path.name for path in Path(folder).iterdir()} - {LOCK}


def entries(index) -> tuple[Entry, ...]:
    """Returns what the manifest says of the shards."""
    return Manifest.read(index.folder).shards


def assert_tidy(index):
    """Nothing lies in the folder but the manifest and the shards that it names."""
    assert files(index.folder) == {"index.json", *(entry.file for entry in entries(index))}


def parts_of(path) -> tuple[bytes, dict[str, bytes]]:
    """Returns a safetensors file's header and the bytes of each of its tensors, read by hand."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    offsets = {name: each["data_offsets"] for name, each in header.items() if name[0] != "_"}
    return content[:start], {
        name: content[start + first : start + last] for name, (first, last) in offsets.items()
    }


def head_sha256(path) -> str:
    """Returns the checksum of a shard that its manifest has: of all but features and maps."""
    header, tensors = parts_of(path)
    head = [tensors[name] for name in sorted(set(tensors) - {"features", "maps", "scales"})]
    return hashlib.sha256(b"".join([header, *head])).hexdigest()


class Images(Dataset):
    """Images, in torchreid's dictionaries where they have labels."""

    def __init__(self, n, labels=True, size=(48, 24), fail_at=None):
        generator = torch.Generator().manual_seed(3)
        self.imgs = torch.rand(n, 3, *size, generator=generator)
        self.labels, self.fail_at = labels, fail_at

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, i):
        if i == self.fail_at:
            raise OSError("a broken image")
        if not self.labels:
            return self.imgs[i]
        return {"img": self.imgs[i], "pid": i // 2, "camid": i % 2, "impath": f"img{i}.jpg"}


def three_shards(folder) -> GalleryIndex:
    """Three shards, one image removed."""
    index = GalleryIndex.create(folder, MODEL)
    for shard in range(3):
        index.add(encoding("basis", 4, shard), names=[f"{shard}{row}" for row in "abcd"])
    index.remove([1])
    return index


def snapshot(folder):
    """Returns all that is in an index, and in its folder."""
    index = GalleryIndex(folder)
    assert_tidy(index)
    return index.names, index.pids.tolist(), index[:].maps.tolist(), files(folder)
