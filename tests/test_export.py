"""Encoders as plain graphs and ONNX files: the same numbers as the model's own."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import TinyBackbone, build_backbone, state_of, tiny_forward
from torch import nn

from casn_plugin import CASN, Preprocessing
from casn_plugin.export import export_onnx, traced_encoder

SIZE = (64, 32)


def tiny():
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4).train()


def models():
    """Models of every form of head; statistics of BatchNorm are no zeros."""
    yield "mean", tiny()
    yield "parts", CASN(build_backbone("pcb_p4"), input_size=(128, 32))
    yield "jacobian", CASN(build_backbone("osnet_x0_25"), input_size=SIZE)
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=SIZE, num_classes=5
    )
    yield "tokens", CASN(vit)
    flipped = tiny()
    flipped.flip = True
    yield "flip", flipped


def randomised(model):
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("name", "model"), list(models()), ids=lambda each: str(each)[:8])
def test_the_graph_encodes_as_the_model_does_and_leaves_it_as_found(name, model):
    randomised(model)
    before = state_of(model)
    traced = traced_encoder(model, batch_size=2)
    imgs = torch.rand_like(traced.imgs)
    own = model.encode(imgs)
    with torch.no_grad():
        encoding = traced.encoding(*traced.graph(imgs))
        exported = torch.export.export(traced.graph, (traced.imgs,)).module()
        again = traced.encoding(*exported(imgs))
    assert encoding.parts == own.parts == (4 if name == "parts" else 0)
    for found in (encoding, again):
        torch.testing.assert_close(found.features, own.features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.maps, own.maps, rtol=1e-5, atol=1e-6)
    assert not torch.equal(own.maps, model.encode(traced.imgs).maps)
    assert state_of(model) == before


def test_an_onnx_file_gives_features_and_basis(tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript, an extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, an extra")
    model = randomised(CASN(build_backbone("osnet_x0_25"), input_size=SIZE))
    model.preprocessing = Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    path = export_onnx(model, tmp_path / "deep" / "osnet.onnx", batch_size=2)
    assert [each.name for each in path.parent.iterdir()] == ["osnet.onnx"]
    session = runtime.InferenceSession(path)
    told = json.loads(session.get_modelmeta().custom_metadata_map["casn_plugin"])
    assert told == {"size": [64, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "maps": "basis"}
    assert [each.name for each in session.get_outputs()] == ["features", "basis"]
    imgs = torch.rand(2, 3, *SIZE)
    features, basis = session.run(None, {"imgs": imgs.numpy()})
    own = model.encode(imgs)
    for found, expected in ((features, own.features), (basis, own.basis)):
        scale = float(expected.abs().max())
        assert np.abs(found - expected.numpy()).max() < 1e-5 * scale and scale > 1e-4


def test_batches_have_a_number_of_images():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        traced_encoder(tiny(), batch_size=0)
