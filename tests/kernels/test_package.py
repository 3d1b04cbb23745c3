"""The package itself: usable without Triton, and at peace with the PyPI package of the same name as its folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
from textkv.kernels.merge import merge
import textkv.kernels.rotate
from textkv import kernels
from textkv.kernels import merge as again, rotate, compact
assert merge is again is kernels.merge and callable(rotate) and callable(compact)
assert callable(kernels.rotate) and not hasattr(kernels, "no_such_name")
try:
    from textkv.kernels import no_such_name
except ImportError as error:
    print(error)
"""
    assert "cannot import name 'no_such_name' from 'textkv.kernels'" in run(code, ROOT)


def test_operations_come_when_they_are_asked_for():
    code = (
        "import sys, kernels; print([name for name in ('triton', 'textkv.kernels.confidence') if name in sys.modules])"
    )
    assert run(code, ROOT).strip() == "[]"


def test_works_without_triton_and_never_names_it_on_the_cpu():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from textkv import kernels
q, k = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 3, 8)
out, lse = kernels.decode_attention(q, k, k, scale=1.0)
kernels.merge([out], [lse]); kernels.window_mass(q, k, scale=1.0); kernels.rotate(k, torch.tensor(1), torch.ones(4))
kernels.compact(k, k, torch.ones(1, 1, 3, dtype=torch.bool)); kernels.subspace_residual(k, torch.zeros(1, 1, 8, 2))
kernels.confidence(k[0, 0])
print(round(out.sum().item()))
"""
    assert run(code, ROOT).strip() == "16"


def test_the_bare_name_at_the_root_of_a_checkout_is_no_second_copy():
    code = "import kernels, textkv.kernels, envs, agentkv.envs; "
    code += "print(kernels.merge is textkv.kernels.merge, envs.make is agentkv.envs.make)"
    assert run(code, ROOT).strip() == "True True"


def test_transformers_without_the_other_package():
    if any(Path(entry, "kernels", "layer").exists() for entry in sys.path):
        pytest.skip("the other package is installed here")
    assert run(LOAD_A_MODEL + "print(is_kernels_available())", ROOT).strip() == "False"


@pytest.mark.parametrize("ours_first", [True, False])
def test_transformers_gets_the_other_package_and_we_ours(other, ours_first):
    pytest.importorskip("transformers")
    code = (
        LOAD_A_MODEL
        + """
import kernels, kernels.layer, textkv.kernels
from transformers.integrations import hub_kernels
assert is_kernels_available() and hub_kernels.LayerRepository is kernels.layer.LayerRepository
assert kernels.LayerRepository is kernels.layer.LayerRepository and kernels.Mode is kernels.layer.Mode
assert textkv.kernels.decode_attention.__module__ == "textkv.kernels.decode_attention"
assert not hasattr(kernels, "decode_attention")
print(kernels.__version__)
"""
    )
    paths = (ROOT, other) if ours_first else (other, ROOT)
    assert run(code, *paths).split("\n")[:2] == ["the other package was loaded", other_version()]


def test_a_folder_or_file_of_such_a_name_in_the_working_directory_disturbs_nothing(tmp_path):
    for name in ("envs", "eval"):  # transformers itself looks into any folder called kernels
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "eval.py").write_text("raise RuntimeError('not ours')")
    code = "import textkv.kernels, agentkv.envs, agentkv.eval.textbench; print(textkv.kernels.merge.__name__)"
    assert run(code, tmp_path, ROOT).strip() == "merge"
