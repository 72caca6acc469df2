"""The cluster as an application of Ray Serve, behind Ray's own proxy, as a RayService runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from experiments.harness.server import free_port
from tests.helpers.http import ask, post, stream, text_of

pytestmark = pytest.mark.cluster

MANIFEST = Path(__file__).parents[3] / "serve" / "cluster" / "rayservice.yaml"
RUN = """
import sys, ray
from ray import serve
from serve.cluster.app import app
ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=128 * 2**20, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
flags = {"model": sys.argv[2], "replicas": 2, "cpus_per_replica": 0.5, "kv_pool_bytes": "8MiB", "max_model_len": 4096}
serve.run(app(flags | {"page_size": 16, "strip_anthropic_preamble": True}), name="tokenzero", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[httpx.Client]:
    """A client of Ray's proxy."""
    port = free_port()
    command = [sys.executable, "-c", RUN, str(port), str(model_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert any(line.strip() == b"ready" for line in process.stdout), "it serves"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        process.kill()


def test_it_answers_and_streams_and_reuses(client: httpx.Client) -> None:
    whole = post(client, ask("Through a proxy " * 20))
    again = stream(client, ask("Through a proxy " * 20))
    assert again.text == text_of(whole)
    assert again.one("message_start")["message"]["usage"]["cache_read_input_tokens"] > 60
    models = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert models["data"][0]["max_input_tokens"] == 4096
    assert client.get("/health").json()["status"] == "ok"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_the_manifest_is_what_ray_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.cluster.config import parse_config

    service = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "serve.cluster.app:app"
    assert {deployment.name for deployment in application.deployments} == {"engine", "ingress"}
    parse_config([f"--{name.replace('_', '-')}={value}" for name, value in application.args.items()])
