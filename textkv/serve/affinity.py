"""Ray Serve's side of `textkv.serve.placing`: the class that it asks where a request goes."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from textkv.serve.placing import first_of


class ByConversation(RequestRouter):
    """Ray Serve's router: a request goes to its conversation's replica and to no other, busy or not.

    Without Ray's `FIFOMixin`: it would give a replica that was found for one request to whichever waits longest.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `ray.serve.request_router.RequestRouter`."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = pending_request.metadata.session_id or pending_request.metadata.internal_request_id
        return [[named[first_of(key, list(named))]]]
