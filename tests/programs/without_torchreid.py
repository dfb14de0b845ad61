"""Imports every module of the package but the engine where torchreid can't be imported."""

import importlib
import pkgutil
import sys

HEAVY = {"torchreid", "torchvision", "matplotlib"}


class Blocked:
    """Lets nobody import torchreid."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchreid":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, Blocked())
import casn_plugin  # noqa: E402

loaded = HEAVY & set(sys.modules)
assert not loaded, f"import casn_plugin loads {loaded}"
names = [each.name for each in pkgutil.walk_packages(casn_plugin.__path__, "casn_plugin.")]
for name in names:
    if name != "casn_plugin.engine":
        importlib.import_module(name)
assert len(names) > 30, names
loaded = HEAVY & set(sys.modules)
assert not loaded, f"the modules load {loaded}"
try:
    importlib.import_module("casn_plugin.engine")
except ModuleNotFoundError as error:
    assert str(error) == "this needs torchreid: pip install torchreid", error
else:
    raise AssertionError("the engine needs no torchreid")
