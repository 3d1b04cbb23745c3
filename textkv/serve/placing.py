"""Which of several replicas a conversation falls to.

A conversation has a key that lasts from turn to turn. The replica whose name, hashed with the key, comes first has it
(rendezvous hashing): when a replica dies, only its own conversations move, and when one comes, only those that it wins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from textkv.serve.protocol import ChatRequest


def key_of(request: ChatRequest) -> str:
    """What stays the same from turn to turn: the client's own `prompt_cache_key`, or how the conversation began, up to
    its first question. A digest, as keys stand in Ray's logs and prompts must not.
    """
    told: Any = request.prompt_cache_key
    if told is None:
        told = []
        for message in request.messages:
            told.append(message.model_dump(mode="json", exclude_none=True))
            if message.role == "user":
                break
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def first_of(key: str, names: Sequence[str]) -> str:
    """The name that the key falls to. Raises ValueError if there is none."""
    return max(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())
