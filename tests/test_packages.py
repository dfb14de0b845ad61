"""Other packages: what is said where one is missing, does not fit, or finds no GPU."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

from casn_plugin.packages import check_device, needed, warn_of_unused_gpu, without_gpu


@pytest.mark.parametrize(
    ("module", "extra", "said"),
    [
        ("torchreid", None, "this needs torchreid: pip install torchreid"),
        ("torchvision.transforms", None, "this needs torchvision: pip install torchvision"),
        ("cv2", None, "this needs cv2: pip install opencv-python"),
        ("pyarrow.parquet", "tables", "this needs pyarrow: pip install 'casn-plugin[tables]'"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(monkeypatch, module, extra, said):
    for name in [*sys.modules]:
        if name.partition(".")[0] == module.partition(".")[0]:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(ModuleNotFoundError) as told, needed(extra):
        importlib.import_module(module)
    assert str(told.value) == said and told.value.name.startswith(module.partition(".")[0])


def test_a_torchvision_of_another_torch_is_said_with_its_remedy():
    wanted = r"does not fit torch .*nms.*--upgrade torch torchvision"
    with pytest.raises(ImportError, match=wanted), needed():
        raise RuntimeError("operator torchvision::nms does not exist")
    for error in (RuntimeError("no room"), ImportError("libGL.so.1"), KeyError("key")):
        with pytest.raises(type(error)) as same, needed():
            raise error
        assert same.value is error


def test_only_the_warnings_that_are_named_are_quiet():
    with pytest.warns(UserWarning) as seen, needed(quiet="Old (and"):
        warnings.warn("Old (and known)", stacklevel=1)
        warnings.warn("New", stacklevel=1)
    assert [str(each.message) for each in seen] == ["New"]


def test_the_engine_is_imported_without_a_word():
    program = "from casn_plugin import ImageCASNEngine"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("built_with", "said"), [(None, "built without GPUs: https://pytorch.org"), ("13.0", "no GPU")]
)
def test_a_gpu_that_is_not_used_is_said(monkeypatch, built_with, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_with)
    assert said in without_gpu()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.warns(UserWarning, match=r"the CPU is used, although .*" + said):
        warn_of_unused_gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unused_gpu(False)  # nobody asks for one
        monkeypatch.setattr("shutil.which", lambda name: None)
        warn_of_unused_gpu()  # there is none
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        warn_of_unused_gpu()  # it is used
    assert without_gpu() == ""


def test_devices_that_are_not_there_are_refused(monkeypatch):
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="a GPU that is there, got cuda: torch"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="got cuda:2: there are 2"):
        check_device("cuda:2")
    with pytest.raises(ValueError, match="a device such as cpu or cuda, got gpu"):
        check_device("gpu")
