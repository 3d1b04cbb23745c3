"""Classes from outside the package: by "module:Class" and by entry points, in every place that takes a name."""

from __future__ import annotations

import importlib
import sys

import pytest

import textkv
from agentkv.models import AGENTS
from dlm import resolve_cache, resolve_unmask
from dlm.unmask import is_rule
from tests.textkv import tiny
from textkv import MethodCache, list_methods, resolve_method
from textkv.method import REGISTRY

MINE = """
from dataclasses import dataclass
from agentkv.models.qwen_vl import QwenVLAdapter
from dlm.cache.freecache import FreeCache
from dlm.unmask.parallel import Threshold
from textkv.methods.snapkv import SnapKV

@dataclass(frozen=True)
class Mine(SnapKV):
    window: int = 4

class Cache(FreeCache): pass
class Rule(Threshold): pass
class Agent(QwenVLAdapter): pass
class Nothing: pass
"""

ENGINE = """
from textkv.retrievers.engines import Engine as Another
from textkv.serve import Engine, Outcome

class Stranger(Another): pass

class Unopened(Engine):
    def prepare(self, request): return request
    def answer(self, prepared, give, cancelled): return Outcome("", "stop", 1, 0, 0)

class Least(Unopened):
    @classmethod
    def open(cls, opening): return cls()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package beside ours, with an entry point as pip would have installed it; forgotten afterwards."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").write_text("")
    (tmp_path / "mypkg" / "mine.py").write_text(MINE)
    (tmp_path / "mypkg" / "engine.py").write_text(ENGINE)
    info = tmp_path / "mypkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[agentkv.methods]\nentered = mypkg.mine:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    known = dict(REGISTRY)
    yield
    for name in set(REGISTRY) - set(known):
        del REGISTRY[name]
    for name in [x for x in sys.modules if x.startswith("mypkg")]:
        del sys.modules[name]


def test_a_method_by_module_and_class(package, tmp_path):
    model, ids = tiny.build("llama"), tiny.text_ids(60)
    method = resolve_method("mypkg.mine:Mine(window=6)+adakv", 0.5)
    assert method.expression == "mypkg.mine:Mine(window=6)+adakv" and method.inner.window == 6
    cache = MethodCache(model, method)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "saved")
    again = MethodCache.load(tmp_path / "saved", model)
    assert again.method.expression == method.expression and again.kv_bytes() == cache.kv_bytes()


def test_a_method_by_its_entry_point(package):
    assert "entered" in list_methods() and "entered" not in REGISTRY  # named without being imported
    assert resolve_method("entered(window=5)").expression == "entered(window=5)"
    with pytest.raises(ValueError, match="unknown method 'enter'; did you mean entered"):
        resolve_method("enter")


def test_caches_rules_and_agents(package):
    assert type(resolve_cache("mypkg.mine:Cache")).__name__ == "Cache"
    assert type(resolve_unmask("mypkg.mine:Rule(0.8)")).__name__ == "Rule"
    assert is_rule("mypkg.mine:Rule") and not is_rule("mypkg.mine:Mine")
    assert AGENTS.find("mypkg.mine:Agent").model_type == "qwen2_5_vl"
    del AGENTS["mypkg.mine:Agent"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nopkg.mine:Mine", "cannot import 'nopkg.mine:Mine': ModuleNotFoundError"),
        ("mypkg.mine:None", "cannot import 'mypkg.mine:None': AttributeError"),
        ("mypkg.mine:Nothing", "'mypkg.mine:Nothing' is no Method of textkv.method; a method is made from it"),
        ("mypkg.mine:", "cannot import 'mypkg.mine:'"),
        (":Mine", "cannot import ':Mine'"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(package, name, said):
    with pytest.raises(ValueError, match=said) as error:
        resolve_method(name)
    assert "\n" not in str(error.value)


def test_an_engine_brings_what_nobody_else_can_say_and_no_more(package):
    from textkv.serve import ENGINES, Opening

    with pytest.raises(ValueError, match="'mypkg.engine:Stranger' is no Engine of textkv.serve.interface; an "):
        ENGINES.find("mypkg.engine:Stranger")
    with pytest.raises(ValueError, match="says nothing of its own for open; write what Engine asks for"):
        ENGINES.find("mypkg.engine:Unopened")
    kind = ENGINES.find("mypkg.engine:Least")
    kind.check(Opening("any"))
    engine = kind.open(Opening("any"))
    assert engine.figures() == {} and engine.rows == 1 and not engine.joins(None) and kind.reads == ()
    engine.close()
    del ENGINES["mypkg.engine:Least"]


def test_ours_have_not_changed():
    assert set(list_methods()) == set(REGISTRY) and "full" in textkv.list_methods()
