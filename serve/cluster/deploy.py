"""Starting Ray and the replicas, and sentences about what cannot be."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve.cluster.client import TRANSPORT
from serve.cluster.config import ClusterConfig
from serve.cluster.report import Identity, Report, difference
from serve.cluster.wire import VERSION

log = logging.getLogger("tokenzero.cluster")

APP, ENGINE = "tokenzero", "engine"
INSTALL = "pip install 'tokenzero[cluster]'"
OBJECT_STORE_BYTES = 128 * 2**20  # nothing large goes through it
# Nothing is told to Ray's makers, and replicas are no less urgent than the ingress: Ray's default is 15.
# A message of Ray Serve holds 4 MiB by default, less than a snapshot of a large pool or a prompt of 1,050,000 tokens.
MESSAGES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**29)}
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **MESSAGES}
CONNECT_SECONDS = 5.0
SPARE_CALLS = 64  # that a replica takes beside its engine's, so that only the engine refuses requests
REPORT_SECONDS = 20.0
UPSCALE_SECONDS = 5.0  # of load, after which Ray adds a replica


class Impossible(ValueError):
    """What was asked for cannot be; the text says what to do."""


def check_installed() -> None:
    """Raise Impossible if Ray Serve is not installed."""
    missing = [name for name in ("ray", "grpc", "fastapi") if find_spec(name) is None]
    if missing:
        raise Impossible(f"{' and '.join(missing)} missing, which run the replicas: {INSTALL}")


def check_resources(config: ClusterConfig, resources: Mapping[str, float]) -> None:
    """Raise Impossible if the replicas need more of a cluster's resources, by Ray's names, than there are."""
    where = f"the Ray cluster at {config.address}" if config.address else "this machine"
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    wanted = config.max_replicas or config.replicas
    if gpus and wanted * config.tp > gpus:
        raise Impossible(
            f"--replicas: {wanted} replicas on {config.tp} GPU each need {wanted * config.tp}, {where} has {gpus:g}: "
            f"give --replicas {max(1, int(gpus // config.tp))}, or JAX_PLATFORMS=cpu to serve on its cores"
        )
    each = cores_each(config, resources)
    if wanted * each > cpus + 1e-9:
        share = math.floor(100 * cpus / wanted) / 100
        raise Impossible(
            f"--replicas: {wanted} replicas of {each:g} cores need {wanted * each:g}, {where} has {cpus:g}: "
            f"give --replicas {max(1, int(cpus // each))}, or --cpus-per-replica {share:g} to share them"
        )


def cores_each(config: ClusterConfig, resources: Mapping[str, float]) -> float:
    """The cores of a replica."""
    if config.cpus_per_replica is not None:
        return config.cpus_per_replica
    if config.address or resources.get("GPU"):
        return 1
    return max(1, int(resources.get("CPU", 1) // (config.max_replicas or config.replicas)))


def start_ray(config: ClusterConfig) -> None:
    """Connect to the cluster's head, or start Ray here. Raises Impossible."""
    check_installed()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not config.address and not has_token():
        # Ray listens on all of this machine's addresses, and unpickles what comes: only its own processes may call.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if not config.address:
        ray.init(
            address="local",
            num_gpus=0 if os.environ.get("JAX_PLATFORMS") == "cpu" else None,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
        return
    check_head(config.address)
    try:
        ray.init(address=config.address, logging_level=logging.WARNING)
    except Exception as error:
        raise Impossible(f"--address {config.address}: {first_line(error)}: {START_HEAD}") from error


def has_token() -> bool:
    """Whether Ray finds a token here, with which a head asks for one by default.

    https://docs.ray.io/en/latest/ray-security/token-auth.html
    """
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return named or Path("~/.ray/auth_token").expanduser().is_file()


START_HEAD = "start one with `ray start --head --port 6379`, or leave --address out to start Ray here"


def check_head(address: str) -> None:
    """Raise Impossible if nothing listens at a head's address."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise Impossible(f"--address: expected HOST:PORT of a Ray head, or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Impossible(f"--address {address}: no Ray head answers there ({error}): {START_HEAD}") from None


def head_answers() -> bool:
    """Whether something listens at the address of the head that this process is connected to."""
    import ray

    try:
        check_head(ray.get_runtime_context().gcs_address)
    except Exception:  # Impossible, or Ray's own
        return False
    return True


def take_back_signals() -> None:
    """Have Python handle SIGTERM again, called on the main thread: Ray's handler ends the process 3 s later."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def deploy(config: ClusterConfig) -> Any:
    """Have Ray run the replicas, unless it runs some already; their handle, once all are ready. Raises Impossible."""
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    if config.address and APP in serve.status().applications:
        log.info("using the replicas that run at %s", config.address)
        return serve.get_deployment_handle(ENGINE, APP)
    resources = ray.cluster_resources()
    check_resources(config, resources)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING"))
    try:
        serve.run(engine_app(config, resources), name=APP, route_prefix=None)
    except RuntimeError as error:
        raise Impossible(cause_of(serve.status().applications[APP], error)) from error
    return serve.get_deployment_handle(ENGINE, APP)


def engine_app(config: ClusterConfig, resources: Mapping[str, float]) -> Any:
    """The replicas as an application of Ray Serve, on a cluster with these resources."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.schema import LoggingConfig

    from serve.cluster.replica import EngineReplica

    cores = cores_each(config, resources)
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas:
        autoscaling = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=max(1.0, config.max_num_seqs / 2),
            upscale_delay_s=UPSCALE_SECONDS,
            look_back_period_s=UPSCALE_SECONDS,
        )
        scaling = {"autoscaling_config": autoscaling}
    return (
        serve.deployment(EngineReplica)
        .options(
            name=ENGINE,
            **scaling,
            ray_actor_options={
                "num_cpus": cores,
                "num_gpus": config.tp if resources.get("GPU") else 0,
                "runtime_env": {"env_vars": environment(cores, on_gpu=bool(resources.get("GPU")))},
            },
            max_ongoing_requests=config.max_num_seqs + config.max_queue + SPARE_CALLS,
            health_check_period_s=2.0,
            health_check_timeout_s=10.0,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=config.stop_seconds,
            max_constructor_retry_count=1,
            request_router_config=RequestRouterConfig(request_router_class="serve.cluster.request_router.PrefixRouter"),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        .bind(config.for_replicas)
    )


def environment(cores: float, on_gpu: bool) -> dict[str, str]:
    """The environment of a replica: on CPUs, XLA takes as many threads as it has cores."""
    return MESSAGES | ({} if on_gpu else {"NPROC": str(max(1, int(cores)))})


def first_reports(handle: Any) -> list[Report]:
    """A report of each replica that answers. Raises Impossible for none, and for those that differ, see check_equal."""
    answers = (
        handle.options(**TRANSPORT).broadcast("report", {}).results(timeout_s=REPORT_SECONDS, return_exceptions=True)
    )
    reports = [answer for answer in answers if isinstance(answer, Report)]
    if not reports:
        why = first_line(answers[0]) if answers else "none runs"
        raise Impossible(f"no replica answers ({why}): end them with `serve shutdown -y`, and start again")
    check_equal(reports)
    return reports


def check_equal(reports: Sequence[Report]) -> None:
    """Raise Impossible if some replicas serve another model, or in another format, than the first."""
    ours = asdict(reports[0].identity)
    for report in reports[1:]:
        if differs := difference(ours, asdict(report.identity)):
            raise Impossible(
                f"replicas {reports[0].name} and {report.name} differ in {differs}: end them with `serve shutdown`, "
                "and start all from the same files and versions"
            )


def check_ours(found: Identity, config: ClusterConfig, tokenizer: bytes) -> None:
    """Raise Impossible if replicas that ran before do not fit the ingress's flags, or its tokenizer."""
    if found.version != VERSION:
        what = f"speak version {found.version} of the cluster's protocol, this ingress version {VERSION}"
    elif found.flags != config.version:
        what = "were started with another --model, or other flags of the engine"
    elif found.tokenizer != tokenizer:
        what = "have another tokenizer than the ingress's --model"
    else:
        return
    raise Impossible(f"the replicas that run already {what}: end them with `serve shutdown -y`, and start again")


def end(config: ClusterConfig) -> None:
    """End what `start_ray` and `deploy` started; replicas of a running cluster stay."""
    import ray
    from ray import serve

    if not config.address:
        serve.shutdown()
    ray.shutdown()


def cause_of(application: Any, error: Exception) -> str:
    """The sentence with which a replica could not start."""
    messages = [deployment.message for deployment in application.deployments.values()]
    found = re.findall(r"^\S*(?:Error|Exception): (.+)$", "\n".join([application.message, *messages]), re.MULTILINE)
    return found[-1] if found else first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]
