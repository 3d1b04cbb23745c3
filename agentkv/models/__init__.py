"""Model adapters: `load_adapter("mini")`, a local folder or a hub id gives a model that can be prompted as a GUI
agent.

Which agent a checkpoint is, in this order: the argument `agent`; the key "agent" of the agent.json beside the weights;
an agent.json without that key is UI-TARS, as the mini model's is; a name (folder, hub id, config) with "ui-tars" in it
is UI-TARS; else the architecture's own: "qwen2.5-vl", "qwen3-vl", "opencua".
"""

from __future__ import annotations

from pathlib import Path

import torch

from agentkv.models.base import AgentText, Frame, History, ModelAdapter, ParseError, Prompt
from agentkv.models.checkpoint import Checkpoint
from agentkv.models.opencua import OpenCuaAdapter
from agentkv.models.qwen3_vl import Qwen3VLAdapter
from agentkv.models.qwen_vl import QwenVLAdapter
from agentkv.models.ui_tars import UiTarsAdapter
from textkv.registry import Registry

__all__ = ["AGENTS", "AgentText", "Frame", "History", "ModelAdapter", "ParseError", "Prompt", "load_adapter"]

AGENTS = Registry("agent", "agentkv.agents", "ChatAdapter")
"""Adapters by name; one from outside is a subclass of `ChatAdapter`, named as `textkv.registry` says."""
AGENTS |= {
    "ui-tars": UiTarsAdapter,
    "qwen2.5-vl": QwenVLAdapter,
    "qwen3-vl": Qwen3VLAdapter,
    "opencua": OpenCuaAdapter,
}
OWN_AGENT = {AGENTS[name].model_type: name for name in ("qwen2.5-vl", "qwen3-vl", "opencua")}
MINI = Path(__file__).parent.parent / "mini" / "weights"


def load_adapter(
    path_or_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    agent: str | None = None,
) -> ModelAdapter:
    """The model at `path_or_id`: "mini" (shipped with this package), a folder, or a hub id. Safetensors only, no remote
    code. `agent` is one of `AGENTS`; None finds it out as the module docstring says.

    Raises FileNotFoundError for a folder without config, weights or a tokenizer that is no code, and for a name that is
    neither a folder nor on a reachable hub; ValueError for a model family without an adapter or an agent that is not of
    this family.
    """
    source = str(MINI) if str(path_or_id) == "mini" else str(path_or_id)
    checkpoint = Checkpoint.at(source)
    if agent is None and checkpoint.model_type not in OWN_AGENT:
        families = ", ".join(OWN_AGENT)
        raise ValueError(
            f"{source} is a {checkpoint.model_type!r} model; supported families: {families} "
            f"(agents: {', '.join(AGENTS)})"
        )
    adapter = AGENTS.find(_checked(agent or _agent_of(checkpoint), checkpoint))
    return adapter.load(source, device, dtype, checkpoint.words(adapter.words))


def _agent_of(checkpoint: Checkpoint) -> str:
    if checkpoint.agent and "agent" in checkpoint.agent:
        return str(checkpoint.agent["agent"])
    of_tars = checkpoint.agent is not None or any("uitars" in name for name in checkpoint.names)
    if of_tars and checkpoint.model_type == UiTarsAdapter.model_type:
        return "ui-tars"
    return OWN_AGENT[checkpoint.model_type]


def _checked(agent: str, checkpoint: Checkpoint) -> str:
    if AGENTS.find(agent).model_type != checkpoint.model_type:
        fitting = ", ".join(name for name, kind in AGENTS.items() if kind.model_type == checkpoint.model_type)
        raise ValueError(
            f"agent {agent!r} is for {AGENTS.find(agent).model_type} models, {checkpoint.source} is a "
            f"{checkpoint.model_type} model; use {fitting}"
        )
    return agent
