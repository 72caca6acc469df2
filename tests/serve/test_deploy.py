"""The files of serve/deploy: they parse, name commands and flags that there are, and agree with one another."""

from __future__ import annotations

import argparse
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.server.config import ServerConfig, problem_of
from serve.web.flags import flags_of, option
from serve.web.settings import read_config, unknown_variable, variable

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serve" / "deploy"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
UNIT_TEXT = (FOLDER / "tokenzero.service").read_text(encoding="utf-8")
FLAGS = {option(name) for name, *_ in flags_of(ServerConfig)}


def unit() -> ConfigParser:
    parser = ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT_TEXT)
    return parser


def manifests() -> dict[str, dict[str, Any]]:
    text = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def config_of(text: str, folder: Path) -> ServerConfig:
    """The configuration by a file, with every flag in it known; its paths need not be there."""
    path = folder / "serve.toml"
    path.write_text(text)
    return read_config(ServerConfig, argparse.Namespace(config=path), {})


def test_the_example_is_a_configuration_that_is_only_short_of_its_files(tmp_path: Path) -> None:
    text = (FOLDER / "serve.toml").read_text(encoding="utf-8")
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{'0' * 64}\n")
    assert problem_of(config_of(text.replace("/etc/tokenzero/keys", str(keys)), tmp_path)) is None


@pytest.mark.parametrize("text", [DOCKERFILE, UNIT_TEXT], ids=["Dockerfile", "unit"])
def test_every_flag_in_a_command_is_one(text: str) -> None:
    for line in re.findall(r"tokenzero serve (.*)", text):
        flags = [word for word in shlex.split(line) if word.startswith("--")]
        assert flags
        assert not set(flags) - FLAGS


def test_the_unit_runs_the_server_by_the_example_as_a_user_of_its_own_in_bounded_memory() -> None:
    service = unit()["Service"]
    assert service["ExecStart"].split()[1:] == ["serve", "--config", "/etc/tokenzero/serve.toml"]
    assert service["User"] not in ("", "root")
    for name in ("MemoryMax", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "SystemCallFilter"):
        assert service[name]
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    written = (FOLDER / "serve.toml").read_text(encoding="utf-8")
    assert f"/var/lib/{service['StateDirectory']}/" in written, "where it may write"


def test_the_image_is_built_of_files_that_are_there_by_hashes_and_runs_without_root() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert set(sources) == {line[1:] for line in ignored if line.startswith("!")}
    for name in ("base", "cuda12", "cuda13"):
        assert (ROOT / ".requirements" / f"{name}.txt").is_file()
    assert "--require-hashes" in DOCKERFILE
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]


def test_variables_of_the_image_are_flags() -> None:
    (line,) = re.findall(r"^ENV (.+)$", DOCKERFILE, re.MULTILINE)
    given = dict(each.split("=", 1) for each in shlex.split(line))
    assert unknown_variable(given, [variable(name) for name, *_ in flags_of(ServerConfig)]) is None
    assert "TOKENZERO_HOST" in given


def test_the_manifests_configuration_is_one_and_its_paths_are_mounted(tmp_path: Path) -> None:
    found = manifests()
    text = found["ConfigMap"]["data"]["serve.toml"]
    config = config_of(text, tmp_path)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    for path in (config.model, str(config.api_key_file), str(config.store)):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path
    assert [port["containerPort"] for port in container["ports"]] == [config.port]
    assert container["args"][0] == "serve"
    assert {word for word in container["args"] if word.startswith("--")} <= FLAGS
    assert container["args"][-1] in mounts


def test_the_manifests_ask_for_no_rights_and_agree_on_what_they_select() -> None:
    found = manifests()
    template = found["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert template["spec"]["enableServiceLinks"] is False
    assert template["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    labels = template["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v
    }
    assert found["PersistentVolumeClaim"]["metadata"]["name"] in claims
