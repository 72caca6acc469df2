"""Replicas that are killed or added, and an ingress that is restarted, on real clusters that share a store."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from moto.server import ThreadedMotoServer

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from tests.helpers.http import FLAGS, Json, ask, ask_for_long, eventually, is_idle, long, open_request, post
from tests.serve.cluster.conftest import PROGRAM, TWO

pytestmark = pytest.mark.cluster


@contextmanager
def cluster(model: Path, folder: Path, *flags: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A cluster with a store in a folder, and a client of it."""
    flags = (*FLAGS, *TWO, "--store", str(folder / "store"), "--flush-seconds", "0.1", *flags)
    with (
        running_server(model, *flags, log=folder / f"{time.time()}.log", program=PROGRAM) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client


def engines(server: Server) -> list[psutil.Process]:
    """The processes of the replicas of a cluster that started Ray itself."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in below if "ServeReplica" in " ".join(process.cmdline())]


def busiest(processes: list[psutil.Process], seconds: float = 0.5) -> psutil.Process:
    """The process that uses the processor most, for a while."""
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(seconds)
    used = [sum(process.cpu_times()[:2]) - start for process, start in zip(processes, before, strict=True)]
    return processes[used.index(max(used))]


def replicas(client: httpx.Client) -> set[str]:
    """The replicas that report."""
    return {key.split('"')[1] for key in scrape(client) if key.startswith("tokenzero_replica_requests{")}


def by_tier(answer: Json) -> dict[str, int]:
    """Where an answer's reused tokens came from."""
    return answer["usage"]["cache_read_by_tier"]


@pytest.fixture(scope="module")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A cluster whose replicas may be killed."""
    with cluster(model_folder, tmp_path_factory.mktemp("killed")) as running:
        yield running


class TestAReplicaIsKilled:
    def test_a_stream_ends_with_an_error_and_its_session_goes_on_warm_elsewhere(
        self, running: tuple[Server, httpx.Client]
    ) -> None:
        server, client = running
        warm = ask(long(1, 3000), 4)
        post(client, warm)
        before = replicas(client)
        with client.stream("POST", "/v1/messages", json=ask_for_long(long(1, 3000)) | {"stream": True}) as response:
            lines = response.iter_lines()
            while "content_block_delta" not in next(lines):
                pass
            time.sleep(1)  # the store has its pages by now
            busiest(engines(server)).kill()
            last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1]
        assert last["type"] == "error"
        assert "send the request again" in last["error"]["message"]
        assert by_tier(post(client, warm))["disk"] > 2900, "the other replica had none of it"
        eventually(lambda: len(replicas(client)) == 2 and replicas(client) != before, "a new one has come", 90)
        eventually(lambda: is_idle(client), "nothing is left of what was lost")

    def test_a_request_without_a_first_token_is_sent_to_another(self, running: tuple[Server, httpx.Client]) -> None:
        server, client = running
        before = scrape(client)["tokenzero_prefilled_tokens_total"]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, client, ask(long(2, 11_000), 4))
            eventually(lambda: scrape(client)["tokenzero_prefilled_tokens_total"] > before + 500, "it is computed")
            busiest(engines(server), 0.2).kill()
            assert answer.result()["usage"]["output_tokens"] == 4


class TestAReplicaHangs:
    def test_it_keeps_nobody_waiting(self, running: tuple[Server, httpx.Client]) -> None:
        server, client = running
        before = scrape(client)["tokenzero_prefilled_tokens_total"]
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(post, client, ask(long(3, 11_000), 4))
            eventually(lambda: scrape(client)["tokenzero_prefilled_tokens_total"] > before + 500, "it is computed")
            hung = busiest(engines(server), 0.2)
            hung.suspend()
            try:
                others = [pool.submit(post, client, ask(long(number, 2000), 4)) for number in range(40, 43)]
                answers = [future.result() for future in (first, *others)]
                assert hung.status() == psutil.STATUS_STOPPED, "Ray has not ended it yet"
                assert len(replicas(client)) == 1, "metrics leave it out"
            finally:
                hung.resume()
        assert [answer["usage"]["output_tokens"] for answer in answers] == [4] * 4
        eventually(lambda: len(replicas(client)) == 2, "it reports again", 90)
        eventually(lambda: is_idle(client), "what was sent to it is cancelled")


def test_a_replica_that_is_added_takes_load_and_the_others_stay_warm(model_folder: Path, tmp_path: Path) -> None:
    with cluster(model_folder, tmp_path, "--replicas", "1", "--max-replicas", "2") as (server, client):
        warm = [ask(long(number, 2000), 4) for number in range(10, 13)]
        for body in warm:
            post(client, body)
        (first,) = replicas(client)
        held = [open_request(server.url, ask_for_long(f"Go on for long, {number}")) for number in range(6)]
        eventually(lambda: len(replicas(client)) == 2, "Ray adds a replica", 120)
        (added,) = replicas(client) - {first}
        held += [open_request(server.url, ask_for_long(f"And on, {number}")) for number in range(2)]
        name = f'tokenzero_replica_requests{{replica="{added}",state="running"}}'
        eventually(lambda: scrape(client)[name] > 0, "the new one answers requests, though it has no page", 20)
        for connection in held:
            connection.close()
        eventually(lambda: is_idle(client), "all are cancelled")
        assert min(sum(by_tier(post(client, body)).values()) for body in warm) > 1900, "what is evicted is stored"


RAY = """
import sys, time, ray
ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=128 * 2**20, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is known to all processes of a Ray cluster that outlives the commands that use it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def ray_head() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Such a cluster: the process that ends with it, and its address."""
    with subprocess.Popen([sys.executable, "-c", RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().decode().strip()
        process.kill()


@pytest.fixture
def head(token: None) -> Iterator[str]:
    """The address of such a cluster."""
    with ray_head() as (_, address):
        yield address


@pytest.mark.usefixtures("token")
def test_a_dead_head_is_named_and_a_new_one_serves_the_same_sessions_warm(model_folder: Path, tmp_path: Path) -> None:
    warm, flags = ask(long(80, 3000), 4), (model_folder, tmp_path, "--address")
    with ray_head() as (process, address), cluster(*flags, address) as (server, client):
        post(client, warm)
        before = scrape(client)["tokenzero_prefilled_tokens_total"]
        with (
            client.stream("POST", "/v1/messages", json=ask_for_long("On and on") | {"stream": True}) as streamed,
            ThreadPoolExecutor(1) as pool,
        ):
            lines = streamed.iter_lines()
            while "content_block_delta" not in next(lines):
                pass
            waits = pool.submit(client.post, "/v1/messages", json=ask(long(81, 11_000), 4))
            eventually(lambda: scrape(client)["tokenzero_prefilled_tokens_total"] > before + 500, "it is computed")
            process.kill()
            last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1]
            refused = waits.result()
        assert last["type"] == "error"
        assert refused.status_code in (500, 529), refused.text
        eventually(lambda: "Ray's head does not" in client.post("/v1/messages", json=warm).text, "why, and what to do")
        assert server.process.poll() is None
    with ray_head() as (_, address), cluster(*flags, address) as (_, client):
        assert by_tier(post(client, warm))["disk"] > 2900, "the new replicas have none of it"


def test_an_ingress_that_is_restarted_knows_what_the_replicas_have(
    head: str, model_folder: Path, tmp_path: Path
) -> None:
    sessions = [ask(long(number, 2500), 4) for number in range(70, 76)]
    with cluster(model_folder, tmp_path, "--address", head) as (server, client):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda body: post(client, body), sessions))
        names = replicas(client)
        assert len(names) == 2
        server.process.kill()
    with cluster(model_folder, tmp_path, "--address", head) as (_, client):
        assert replicas(client) == names, "the replicas went on"
        found = [by_tier(post(client, body))["device"] for body in sessions]
        assert min(found) > 2400, "each goes where its pages are"
    other_flags = cluster(model_folder, tmp_path, "--address", head, "--max-num-seqs", "3")
    with (
        pytest.raises(RuntimeError, match=r"other flags of the engine: end them with `serve shutdown -y`"),
        other_flags,
    ):
        pass


def test_replicas_share_pages_in_a_bucket(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    bucket.start()
    url = "http://{}:{}".format(*bucket.get_host_and_port())
    for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    httpx.put(f"{url}/pages").raise_for_status()
    body = ask(long(30, 3000), 4)
    with cluster(model_folder, tmp_path, "--store", "s3://pages/shared", "--routing", "round-robin") as (_, client):
        first = post(client, body)
        time.sleep(3)  # written behind
        second = post(client, body)
        assert by_tier(first).get("remote", 0) == 0
        # Until it knows how slow this bucket is: the rest of so small a model's pages is computed sooner.
        assert by_tier(second)["remote"] >= 256, "the other replica reads what the first one computed"
    bucket.stop()


def test_who_has_no_token_cannot_call_a_replica(running: tuple[Server, httpx.Client]) -> None:
    import grpc  # comes with the extra `cluster`

    server, _ = running
    ports = [c.laddr.port for p in engines(server) for c in p.net_connections("tcp") if c.status == "LISTEN"]
    refused = 0
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as error:
                call(b"", timeout=5)
            assert error.value.code() is not grpc.StatusCode.OK
            refused += error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused >= len(engines(server))
