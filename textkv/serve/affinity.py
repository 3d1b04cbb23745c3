"""Which replica answers a conversation: the same one every turn, as its cache lies there.

Ray Serve asks a router class where a request goes. This one takes the replica whose name, hashed with the key of the
conversation, comes first (rendezvous hashing): when a replica dies, only its own conversations move, and when one
comes, only those that it wins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

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


class ByConversation(FIFOMixin, RequestRouter):
    """Ray Serve's router: a request goes to its conversation's replica and to no other, busy or not."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `ray.serve.request_router.RequestRouter`."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = pending_request.metadata.session_id or pending_request.metadata.internal_request_id
        return [[named[first_of(key, list(named))]]]
