"""KVCOMM: agents that run one model share the KV of texts that stand behind different roles (arXiv 2510.12872).

    engine = KVComm(model, tokenizer)
    team = Team.chain(engine, {"reader": "You read carefully.", "judge": "You decide."})
    calls = team.run({"document": "..", "question": ".."})

A model of the Qwen-VL families shares pictures too, so that a planner and an actor need not both read a screenshot:

    team = Team.chain(engine, {"planner": "..", "actor": ".."}, shared=("screenshot", "goal"))
    calls = team.run({"screenshot": picture(model, image_processor, image), "goal": ".."})

Experimental, as the paper is: estimated KV is not the KV that a model would have computed. A text without fitting
anchors is read densely.
"""

from textkv.reuse.kvcomm.anchors import AnchorPool, Criteria
from textkv.reuse.kvcomm.engine import Call, Dense, Prefix
from textkv.reuse.kvcomm.recompute import Recompute
from textkv.reuse.kvcomm.sharing import KVComm
from textkv.reuse.kvcomm.team import Team
from textkv.reuse.kvcomm.template import PromptTemplate, Segment
from textkv.reuse.pictures import Picture, picture

__all__ = [
    "AnchorPool", "Call", "Criteria", "Dense", "KVComm", "Picture", "Prefix", "PromptTemplate", "Recompute", "Segment",
    "Team", "picture",
]  # fmt: skip
