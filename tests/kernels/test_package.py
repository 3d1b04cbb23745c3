"""The package itself: light, usable without Triton, and at peace with the PyPI package of the same import name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[2]

# What transformers takes from the other package, with decorators that do nothing.
OTHER_INIT = """
import importlib.metadata

__version__ = importlib.metadata.version("kernels")

from kernels.layer import CUDAProperties, Device, KernelizeFallback, LayerRepository, LocalLayerRepository
from .layer import Mode, ROCMProperties

print("the other package was loaded")

def register_kernel_mapping(*args, **kwargs): ...
def replace_kernel_forward_from_hub(*args, **kwargs): ...
def use_kernel_mapping(*args, **kwargs): ...
def get_kernel(*args, **kwargs): ...
def kernelize(*args, **kwargs): ...
def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*names): return lambda cls: cls
"""
OTHER_LAYER = "".join(
    f"class {name}: ...\n"
    for name in (
        "CUDAProperties",
        "Device",
        "KernelizeFallback",
        "LayerRepository",
        "LocalLayerRepository",
        "Mode",
        "ROCMProperties",
    )
)

LOAD_A_MODEL = """
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_kernels_available

config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
AutoModelForCausalLM.from_config(config)
"""


def run(code: str, *paths: Path) -> str:
    """Run `code` in a fresh process with `paths` first on sys.path (-P: the working folder is not on it)."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def other_version() -> str:
    """The oldest version of the other package that the installed transformers accepts."""
    spec = importlib.util.find_spec("transformers")
    source = (Path(spec.origin).parent / "utils" / "import_utils.py").read_text(encoding="utf-8")
    return re.search(r'KERNELS_MIN_VERSION = "(.+?)"', source).group(1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder like site-packages with a package `kernels` and its metadata."""
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{other_version()}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(OTHER_INIT)
    (package / "layer.py").write_text(OTHER_LAYER)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {other_version()}\n")
    return tmp_path


def test_operations_stay_functions_whatever_is_imported_first():
    code = """
from kernels.merge import merge
import kernels.rotate
from kernels import merge as again, rotate, compact
assert merge is again is kernels.merge and callable(rotate) and callable(compact)
assert callable(kernels.rotate) and not hasattr(kernels, "no_such_name")
try:
    from kernels import no_such_name
except ImportError as error:
    print(error)
"""
    assert "cannot import name 'no_such_name' from 'kernels'" in run(code, ROOT)


def test_import_is_light():
    code = "import sys, kernels; print([name for name in ('torch', 'triton', 'transformers') if name in sys.modules])"
    assert run(code, ROOT).strip() == "[]"


def test_works_without_triton_and_never_names_it_on_the_cpu():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, kernels
q, k = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 3, 8)
out, lse = kernels.decode_attention(q, k, k, scale=1.0)
kernels.merge([out], [lse]); kernels.window_mass(q, k, scale=1.0); kernels.rotate(k, torch.tensor(1), torch.ones(4))
kernels.compact(k, k, torch.ones(1, 1, 3, dtype=torch.bool)); kernels.subspace_residual(k, torch.zeros(1, 1, 8, 2))
kernels.confidence(k[0, 0])
print(round(out.sum().item()))
"""
    assert run(code, ROOT).strip() == "16"


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kernels._VERSION == project["version"]


def test_transformers_without_the_other_package():
    if importlib.util.find_spec("kernels").submodule_search_locations[1:] or kernels._other is not None:
        pytest.skip("the other package is installed here")
    code = LOAD_A_MODEL + "import kernels; print(is_kernels_available(), kernels.__version__, bool(kernels.OPERATIONS))"
    assert run(code, ROOT).strip() == f"False {kernels._VERSION} True"


def test_transformers_with_the_other_package_behind_ours(other):
    pytest.importorskip("transformers")
    code = (
        LOAD_A_MODEL
        + """
import kernels, kernels.layer
from transformers.integrations import hub_kernels
assert is_kernels_available() and hub_kernels.LayerRepository is kernels.layer.LayerRepository
assert kernels.LayerRepository is kernels.layer.LayerRepository and kernels.Mode is kernels.layer.Mode
assert callable(kernels.decode_attention) and kernels.decode_attention.__module__ == "kernels.decode_attention"
print(kernels.__version__)
"""
    )
    assert run(code, ROOT, other).split("\n")[:2] == ["the other package was loaded", other_version()]


def test_the_other_package_is_not_loaded_before_it_is_needed(other):
    code = """
import kernels
kernels.merge, kernels.OPERATIONS, getattr(kernels, "__wrapped__", None)
import kernels.layer
print("quiet so far"); kernels.get_kernel; kernels.kernelize
try:
    kernels.no_such_name
except AttributeError:
    print("no such name")
"""
    assert run(code, ROOT, other).split("\n")[:3] == ["quiet so far", "the other package was loaded", "no such name"]


def test_ours_hidden_behind_the_other_package_can_be_noticed(other):
    assert "False" in run("import kernels; print(hasattr(kernels, 'OPERATIONS'))", other, ROOT)


def test_a_bare_folder_or_a_second_copy_of_ours_is_not_the_other_package(tmp_path):
    copy = tmp_path / "copy" / "kernels"
    copy.mkdir(parents=True)
    for file in (ROOT / "kernels").glob("*.py"):
        (copy / file.name).write_text(file.read_text())
    (tmp_path / "bare" / "kernels").mkdir(parents=True)
    code = "import kernels; print(kernels._other, hasattr(kernels, 'get_kernel'), len(kernels.__path__))"
    for folder in (copy.parent, tmp_path / "bare"):
        assert run(code, ROOT, folder).strip() == "None False 1"
