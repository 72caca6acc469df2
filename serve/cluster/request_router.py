"""Where Ray Serve's router asks ours: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.cluster.dispatch import Call


class PrefixRouter(RequestRouter):
    """Sends each call where its dispatch wants it. Ray keeps the replicas' list, retries, and refuses when all fail."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica for a call; any replica for what is not one."""
        call = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(call, Call):
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = by_name[call.dispatch.choose(call, list(by_name))]
        # Ray asks a replica for the length of its queue if it has not heard of it for long: one more round trip. The
        # engine bounds its queue itself.
        if self.replica_queue_len_cache.get(chosen.replica_id) is None:
            self.on_new_queue_len_info(chosen.replica_id, 0)
        return [[chosen]]
