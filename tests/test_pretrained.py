"""A trained model in a folder: the same numbers again, and nothing else is taken for it."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, build_backbone, tiny_forward
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from casn_plugin import CASN, Preprocessing, Similarity, explain_pair
from casn_plugin.pretrained import FILE, Network, _packed, from_pretrained, save_pretrained

SIZE = (64, 32)
OSNET = Network("torchreid", "osnet_x0_25", {"num_classes": 5, "loss": "softmax"})
COLOURS = Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))


def osnet(**options):
    torch.manual_seed(3)
    return CASN(OSNET.build(), input_size=SIZE, **options)


@pytest.mark.parametrize("evidence", ["trained", "similarity"])
def test_a_model_comes_back_with_all_that_ranking_needs(tmp_path, evidence):
    options = {"pair_classifier": Similarity()} if evidence == "similarity" else {"hidden_dim": 8}
    model = osnet(**options)
    model.flip = evidence == "similarity"
    for layer in model.pair_classifier.parameters():
        nn.init.normal_(layer)
    model.preprocessing = COLOURS
    folder = save_pretrained(nn.DataParallel(model), tmp_path / "a", OSNET)
    assert sorted(each.name for each in folder.iterdir()) == [FILE]
    again = from_pretrained(folder)
    assert not again.training and again.preprocessing == COLOURS and again.flip == model.flip
    imgs = torch.rand(2, 3, *SIZE)
    one, other = model.encode(imgs), again.encode(imgs)
    assert torch.equal(one.features, other.features) and torch.equal(one.maps, other.maps)
    first, second = (explain_pair(each, *imgs) for each in (model, again))
    assert first.headline() == second.headline() and first.evidence == second.evidence


@pytest.mark.parametrize(
    "network",
    [
        Network("timm", "test_vit", {"num_classes": 5, "img_size": [64, 32]}),
        Network("torchvision", "mobilenet_v2", {"num_classes": 5}),
    ],
    ids=lambda network: network.library,
)
def test_networks_of_other_libraries_are_made_again(tmp_path, network):
    model = CASN(network.build(), input_size=SIZE, hidden_dim=4).eval()
    again = from_pretrained(save_pretrained(model, tmp_path, network))
    imgs = torch.rand(1, 3, *SIZE)
    assert torch.equal(model.encode(imgs).maps, again.encode(imgs).maps)
    assert again.reader.target_layer == model.reader.target_layer


def test_a_layer_of_ones_own_choice_is_tapped_again(tmp_path):
    model = osnet(target_layer="conv4", hidden_dim=4).eval()
    assert model.reader.target_layer == "conv4" != osnet(hidden_dim=4).reader.target_layer
    again = from_pretrained(save_pretrained(model, tmp_path, OSNET))
    imgs = torch.rand(1, 3, *SIZE)
    assert torch.equal(model.encode(imgs).maps, again.encode(imgs).maps)


def test_a_network_of_ones_own_is_given_again(tmp_path):
    model = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4)
    save_pretrained(model, tmp_path, None)
    with pytest.raises(ValueError, match="does not say how its network is made: give it as back"):
        from_pretrained(tmp_path)
    again = from_pretrained(tmp_path, backbone=TinyBackbone(), forward=tiny_forward)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="is of another network"):
        from_pretrained(tmp_path, backbone=TinyBackbone(num_classes=9), forward=tiny_forward)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_wherever_saving_ends_the_folder_has_the_old_model_or_the_new_one(
    tmp_path, monkeypatch, error
):
    old, new = (CASN(TinyBackbone(), forward=tiny_forward, hidden_dim=4) for _ in range(2))
    new.preprocessing, left, replace = COLOURS, [], os.replace

    def interrupted(*paths):
        left.append(paths)
        if len(left) > steps:
            raise error
        replace(*paths)

    done = steps = 0
    while not done:
        save_pretrained(old, tmp_path, None)
        with monkeypatch.context() as patched, contextlib.suppress(error):
            left.clear()
            patched.setattr(os, "replace", interrupted)
            done = save_pretrained(new, tmp_path, None)
        again = from_pretrained(tmp_path, backbone=TinyBackbone(), forward=tiny_forward)
        one = old if again.preprocessing == old.preprocessing else new
        for name, value in one.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        steps += 1
    assert one is new and steps > 1 and [each.name for each in tmp_path.iterdir()] == [FILE]


def test_numbers_of_every_kind_are_saved(tmp_path, unchecked):
    model = CASN(TinyBackbone(), forward=tiny_forward, hidden_dim=np.int64(4))
    model.preprocessing = Preprocessing(np.array(SIZE), torch.full((3,), 0.5), np.ones(3, "f"))
    model.flip = np.True_
    save_pretrained(model, tmp_path, None)
    again = from_pretrained(tmp_path, backbone=TinyBackbone(), forward=tiny_forward)
    assert again.flip is True and again.preprocessing == Preprocessing(SIZE, [0.5] * 3, [1] * 3)


def test_other_files_are_refused(tmp_path, unchecked):
    with pytest.raises(FileNotFoundError):
        from_pretrained(tmp_path)
    file = save_pretrained(osnet(), tmp_path, OSNET) / FILE
    state, data = load_file(file), file.read_bytes()
    with safe_open(file, "pt") as opened:
        whole = json.loads(opened.metadata()["casn_plugin"])
    for change, message in (
        ({"format": 1}, "or of another version"),
        ({"hidden_dim": "8"}, "or of another version"),
        ({"more": 1}, "or of another version"),
        ({"network": {"library": "os", "name": "system", "options": {}}}, "library must be"),
        ({"network": {"library": "timm"}}, "must have library, name and options"),
        ({"preprocessing": {"size": [64, 32]}}, "must have size, mean and std"),
        ({"preprocessing": {"size": [64, 32], "mean": "red", "std": [1, 1, 1]}}, "mean must be"),
        ({"preprocessing": {"size": [0, 32], "mean": [1] * 3, "std": [1] * 3}}, "size must be"),
    ):
        file.write_bytes(_packed(state, {**whole, **change}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)
    for metadata in (None, {"casn_plugin": "{}"}):
        save_file(state, file, metadata)
        with pytest.raises(ValueError, match="is of no model that save_pretrained saved"):
            from_pretrained(tmp_path)
    save_file(state, file, {"casn_plugin": "[" * 100_000})
    with pytest.raises(ValueError, match="is damaged: maximum recursion"):
        from_pretrained(tmp_path)
    mean = data.index(b"0.485")
    for place in (0, mean + 4, len(data) // 2, len(data) - 100):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=f"{FILE} is damaged"):
            from_pretrained(tmp_path)
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{FILE} is damaged"):
        from_pretrained(tmp_path)


def test_what_can_not_be_saved_is_refused_and_nothing_is_written(tmp_path, unchecked):
    with pytest.raises(ValueError, match="library must be 'torchreid', 'timm' or 'torchvision'"):
        Network("os", "system")
    for options in ({"layers": (1, 2)}, {"layer": nn.ReLU}, {"rate": float("nan")}):
        with pytest.raises(ValueError, match="plain values, as JSON has them"):
            Network("timm", "resnet18", options)
    own = osnet(pair_classifier=nn.Linear(512, 2))
    with pytest.raises(TypeError, match="must be a PairClassifier or a Similarity, got Linear"):
        save_pretrained(own, tmp_path / "new", OSNET)
    with pytest.raises(TypeError, match="network must be a Network, got str"):
        save_pretrained(osnet(), tmp_path / "new", "osnet_x0_25")
    with pytest.raises(TypeError, match="model must be a CASN"):
        save_pretrained(build_backbone("osnet_x0_25"), tmp_path / "new", OSNET)
    assert not (tmp_path / "new").exists()
