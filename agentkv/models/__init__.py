"""Model adapters: `load_adapter("mini")`, a local folder or a hub id gives a model that can be prompted as a GUI
agent.

Which agent a checkpoint is, in this order: the argument `agent`; the key "agent" of the agent.json beside the weights;
an agent.json without that key is UI-TARS, as the mini model's is; a name (folder, hub id, config) that an agent of this
architecture is known by; else the architecture's own: "qwen2.5-vl", "qwen3-vl", "qwen3.5", "opencua".
"""

from __future__ import annotations

from pathlib import Path

import torch

from agentkv.models.base import AgentText, Frame, History, ModelAdapter, ParseError, Prompt
from agentkv.models.checkpoint import Checkpoint
from agentkv.models.evocua import EvoCuaAdapter, EvoCuaS1Adapter
from agentkv.models.fara import FaraAdapter
from agentkv.models.gui_owl import GuiOwlAdapter
from agentkv.models.holo import Holo2Adapter, HoloAdapter
from agentkv.models.mai_ui import MaiUiAdapter
from agentkv.models.opencua import OpenCuaAdapter
from agentkv.models.qwen3_5 import Qwen35Adapter
from agentkv.models.qwen3_vl import Qwen3VLAdapter
from agentkv.models.qwen_vl import QwenVLAdapter
from agentkv.models.ui_tars import UiTarsAdapter
from textkv.registry import Registry

__all__ = ["AGENTS", "AgentText", "Frame", "History", "ModelAdapter", "ParseError", "Prompt", "load_adapter"]

AGENTS = Registry("agent", "agentkv.agents", "agentkv.models.chat.ChatAdapter")
"""Adapters by name; one from outside is a subclass of `ChatAdapter`, named as `textkv.registry` says."""
AGENTS |= {
    "ui-tars": UiTarsAdapter,
    "qwen2.5-vl": QwenVLAdapter,
    "qwen3-vl": Qwen3VLAdapter,
    "qwen3.5": Qwen35Adapter,
    "opencua": OpenCuaAdapter,
    "gui-owl": GuiOwlAdapter,
    "evocua-s1": EvoCuaS1Adapter,
    "evocua": EvoCuaAdapter,
    "mai-ui": MaiUiAdapter,
    "fara": FaraAdapter,
    "holo": HoloAdapter,
    "holo2": Holo2Adapter,
}
OWN_AGENT = {kind.model_type: name for name, kind in AGENTS.items() if not kind.known_by}
# what is known by name, but whose words nobody outside its makers knows
CLOSED = {"holo3": "Holo3's tool schema", "holo4": "Holo4's tool schema"}
MINI = Path(__file__).parent.parent / "mini" / "weights"
EMBEDDED = {"mini": MINI, "mini-growing": MINI.with_name("growing")}
"""Models that are shipped with this package; the second one also knows the chat that only grows."""


def load_adapter(
    path_or_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    agent: str | None = None,
    weights: bool = True,
) -> ModelAdapter:
    """The model at `path_or_id`: one of `EMBEDDED` ("mini"), a folder, or a hub id. Safetensors only, no remote code.
    `agent` is one of `AGENTS`; None finds it out as the module docstring says. Without `weights` it writes prompts and
    reads answers for a model that is run elsewhere.

    Raises FileNotFoundError for a folder without config, weights or a tokenizer that is no code, and for a name that is
    neither a folder nor on a reachable hub; ValueError for a model family without an adapter or an agent that is not of
    this family.
    """
    source = str(EMBEDDED.get(str(path_or_id), path_or_id))
    checkpoint = Checkpoint.at(source)
    if agent is None and checkpoint.model_type not in OWN_AGENT:
        families = ", ".join(OWN_AGENT)
        raise ValueError(
            f"{source} is a {checkpoint.model_type!r} model; supported families: {families} "
            f"(agents: {', '.join(AGENTS)})"
        )
    adapter = AGENTS.find(_checked(agent or _agent_of(checkpoint), checkpoint))
    return adapter.load(source, device, dtype, checkpoint.words(adapter.words), weights)


def _agent_of(checkpoint: Checkpoint) -> str:
    if checkpoint.agent and "agent" in checkpoint.agent:
        return str(checkpoint.agent["agent"])
    if checkpoint.agent is not None and checkpoint.model_type == UiTarsAdapter.model_type:
        return "ui-tars"
    called = "/".join(checkpoint.names)
    for word, what in CLOSED.items():
        if word in called:
            raise ValueError(
                f"{checkpoint.source}: {what} is not public, so it cannot be prompted as it was trained; "
                f"say --agent {OWN_AGENT[checkpoint.model_type]} to try it as a plain {checkpoint.model_type} model"
            )
    fitting = [name for name, kind in AGENTS.items() if kind.model_type == checkpoint.model_type]
    known = [name for name in fitting if any(word in called for word in AGENTS[name].known_by)]
    return known[0] if known else OWN_AGENT[checkpoint.model_type]


def _checked(agent: str, checkpoint: Checkpoint) -> str:
    if AGENTS.find(agent).model_type != checkpoint.model_type:
        fitting = ", ".join(name for name, kind in AGENTS.items() if kind.model_type == checkpoint.model_type)
        raise ValueError(
            f"agent {agent!r} is for {AGENTS.find(agent).model_type} models, {checkpoint.source} is a "
            f"{checkpoint.model_type} model; use {fitting}"
        )
    return agent
