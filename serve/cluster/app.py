"""The cluster as an application of Ray Serve: `serve.cluster.app:app`, for `serve run`, `serve deploy` and RayService.

Its arguments are the flags of `tokenzero cluster` without their dashes: `{model: DIR, replicas: 4, max_num_seqs: 8}`.
The ingress is a deployment, too; its clients come through Ray's own proxies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from cache.private import write_for_this_user
from serve.cluster import deploy
from serve.cluster.cli import ingress, load_text
from serve.cluster.config import ClusterConfig, parse_config
from serve.engine.runtime import leave_out_torch
from serve.server.threads import in_thread

if TYPE_CHECKING:
    from starlette.applications import Starlette

INGRESS = {
    "name": "ingress",
    "max_ongoing_requests": 1000,
    "ray_actor_options": {"runtime_env": {"env_vars": deploy.MESSAGES}},
}


def app(flags: dict[str, Any]) -> Any:
    """The application that some flags ask for. Ends with a sentence if they are wrong."""
    config = parse_config([written(name.replace("_", "-"), value) for name, value in flags.items()])
    engines = deploy.engine_app(config, ray.cluster_resources())
    served = serve.ingress(lambda: starlette(config))(Ingress)
    return serve.deployment(served).options(**INGRESS).bind(engines)


def written(name: str, value: Any) -> str:
    """A flag as the command line has it; a switch is true or false."""
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"


class Ingress:
    """One server's application in an actor."""

    def __init__(self, engines: Any) -> None:
        """`engines` is there before the ingress is."""


def starlette(config: ClusterConfig) -> Starlette:
    """One server's application over the replicas of the Ray Serve application that this actor belongs to."""
    from serve.server.progress import StartProgress

    write_for_this_user()
    leave_out_torch()
    handle, text = serve.get_deployment_handle(deploy.ENGINE), load_text(config, StartProgress())
    # In a thread, as this one has an event loop, on which Ray allows no waiting.
    return in_thread(ingress, config, handle, text, lambda: None, lambda: None).result()
