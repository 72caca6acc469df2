"""Where values of flags come from: flag, variable, file, default; and what is said of a wrong one."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.__main__ import main
from serve.cluster.config import ClusterConfig
from serve.proxy.cli import ProxyConfig
from serve.server.config import ServerConfig, parse_config, parser
from serve.web.flags import flags_of
from serve.web.settings import OTHER_VARIABLES, ConfigError, read_config, unknown_variable, variable

CONFIGS = (ServerConfig, ClusterConfig, ProxyConfig)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours, but those that a test sets."""
    for name in [*os.environ]:
        if name.startswith("TOKENZERO_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "served.toml"


def read(file: Path, text: str, flags: Sequence[str] = (), **environ: str) -> ServerConfig:
    """The configuration of a server by a file of this text, flags and variables."""
    file.write_text(text)
    return read_config(ServerConfig, parser().parse_args(["--config", str(file), *flags]), environ)


class TestOrder:
    def test_a_flag_comes_before_its_variable_that_before_the_file_and_that_before_the_default(
        self, file: Path
    ) -> None:
        text = 'model = "m"\nport = 3\n'
        both = {"TOKENZERO_PORT": "2"}
        assert read(file, 'model = "m"').port == 8000
        assert read(file, text).port == 3
        assert read(file, text, **both).port == 2
        assert read(file, text, ("--port", "1"), **both).port == 1
        assert read(file, text, **both).sources == {
            "config": "--config",
            "model": f"{file}:1",
            "port": "TOKENZERO_PORT",
        }

    def test_an_empty_variable_is_none(self, file: Path) -> None:
        assert read(file, 'model = "m"\nport = 3', TOKENZERO_PORT="").port == 3

    def test_the_file_may_be_named_by_a_variable(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file.write_text('model = "from the file"')
        monkeypatch.setenv("TOKENZERO_CONFIG", str(file))
        assert parse_config([]).model == "from the file"

    def test_places_are_no_part_of_what_a_configuration_is(self) -> None:
        one = read_config(ServerConfig, parser().parse_args(["--model", "m", "--port", "3"]), {})
        other = read_config(ServerConfig, parser().parse_args(["--model", "m"]), {"TOKENZERO_PORT": "3"})
        assert one == other
        flags = argparse.Namespace(model="m", page_size=32)
        variables = {"TOKENZERO_MODEL": "m", "TOKENZERO_PAGE_SIZE": "32"}
        assert read_config(ClusterConfig, flags, {}).version == (
            read_config(ClusterConfig, argparse.Namespace(), variables).version
        )


class TestEveryFlag:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_it_has_a_variable_and_an_entry_that_read_as_it_does(self, config: type, tmp_path: Path) -> None:
        """Each value is one that differs from the default, written in both ways."""
        for name, default, flag in flags_of(config):
            if name in ("config", "show_config"):
                continue
            text = written(default, flag.choices, flag.parse)
            required = {"TOKENZERO_MODEL": "m", "TOKENZERO_UPSTREAM": "http://a"}
            by_variable = read_config(config, argparse.Namespace(), required | {variable(name): text})
            file = tmp_path / "f.toml"
            value = text if isinstance(default, bool) else f'"{text}"'
            file.write_text(f"{name.replace('_', '-')} = {value}\n")
            bare = {key: at for key, at in required.items() if key != variable(name)}
            by_file = read_config(config, argparse.Namespace(config=file), bare)
            assert getattr(by_file, name) == getattr(by_variable, name) != default

    def test_one_that_is_given_more_than_once_is_a_list(self, file: Path) -> None:
        file.write_text('upstream = ["http://a", "http://b"]')
        by_file = read_config(ProxyConfig, argparse.Namespace(config=file), {})
        by_variable = read_config(ProxyConfig, argparse.Namespace(), {"TOKENZERO_UPSTREAM": "http://a, http://b"})
        assert by_file.upstream == by_variable.upstream == ["http://a", "http://b"]

    def test_numbers_of_a_file_need_no_quotes(self, file: Path) -> None:
        config = read(file, 'model = "m"\nstore-bytes = 4096\naudit-share = 0.5\nstop-seconds = 3\n')
        assert (config.store_bytes, config.audit_share, config.stop_seconds) == (4096, 0.5, 3.0)


def written(default: object, choices: tuple[str, ...] | None, parse: object) -> str:
    """A value of a flag as text, another one than its default."""
    if isinstance(default, bool):
        return "false" if default else "true"
    if choices:
        return next(each for each in choices if each != default)
    return "7" if parse is not str else "http://x"


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "refused"),
        [
            ("\nprot = 1", ":2: unknown key 'prot': did you mean port?"),
            ("max_queue = 1", ":1: unknown key 'max_queue': did you mean max-queue?"),
            ("xyzzy = 1", ":1: unknown key 'xyzzy': see --help"),
            ('config = "other.toml"', ":1: unknown key 'config': "),
            ("[server]\nport = 1", ":1: server: expected a flag's value, got a table: write the flags outside"),
            ("page-size = true", ":1: page-size: expected text or a number, got True"),
            ('page-size = "many"', ":1: page-size: expected a whole number, got 'many'"),
            ("page-size = 1.5", ":1: page-size: expected a whole number, got '1.5'"),
            ("flush-seconds = []", ":1: flush-seconds: expected text or a number, got []"),
            ('dtype = "int4"', ":1: dtype: expected one of auto, float32, bfloat16, got 'int4'"),
            ('# sizes\n"store-bytes" = "lots"', ":2: store-bytes: expected a size such as 4GB or 512MiB, got 'lots'"),
            ('strip-anthropic-preamble = "yes"', ":1: strip-anthropic-preamble: expected true or false, got 'yes'"),
            ("port = 1\nport = 2\n", ": expected TOML: Cannot overwrite a value (at line 2"),
            ("port", ": expected TOML: Expected '=' after a key in a key/value pair (at"),
        ],
    )
    def test_a_wrong_entry_is_named_with_its_line(self, text: str, refused: str, file: Path) -> None:
        with pytest.raises(ConfigError) as error:
            read(file, text)
        assert str(error.value).startswith(f"{file}{refused}")

    def test_a_file_that_cannot_be_read_is_named(self, file: Path) -> None:
        args = parser().parse_args(["--config", str(file)])
        with pytest.raises(ConfigError, match=r"served\.toml: expected a TOML file: No such file"):
            read_config(ServerConfig, args, {})
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=r"served\.toml: expected TOML: 'utf-8' codec"):
            read_config(ServerConfig, args, {})

    def test_no_refusal_shows_a_secret(self, file: Path) -> None:
        with pytest.raises(ConfigError) as error:
            read(file, 'api-key = ["hunter2"]')
        assert "api-key: expected text" in str(error.value)
        assert "hunter2" not in str(error.value)

    @pytest.mark.parametrize(
        ("name", "text", "refused"),
        [
            ("TOKENZERO_PAGE_SIZE", "x", "TOKENZERO_PAGE_SIZE: expected a whole number, got 'x'"),
            ("TOKENZERO_PAGE_SIZE", "0", "TOKENZERO_PAGE_SIZE: --page-size: expected at least 1, got 0"),
            ("TOKENZERO_HOST", "0.0.0.0", "TOKENZERO_HOST: --host 0.0.0.0 is reachable from elsewhere"),
            ("TOKENZERO_PROT", "1", "TOKENZERO_PROT: unknown variable: did you mean TOKENZERO_PORT?"),
            ("TOKENZERO_ON_IMAGE", "x", "TOKENZERO_ON_IMAGE: expected one of placeholder, error, got 'x'"),
            ("TOKENZERO_PORT", "tcp://10.0.0.1:80", "which Kubernetes sets for a service of this name: set enable"),
            ("TOKENZERO_NO_PROMPT_TEXT_IN_REPORTS", "maybe", "_REPORTS: expected true or false, got 'maybe'"),
        ],
    )
    def test_a_wrong_variable_is_named(
        self, name: str, text: str, refused: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(name, text)
        with pytest.raises(SystemExit) as ended:
            main(["--model", "m"])
        assert ended.value.code == 2
        assert refused in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("flags", "refused"),
        [
            (("--prot", "1"), "--prot: unknown flag: did you mean --port?"),
            (("--no-strip-preamble",), "--no-strip-preamble: unknown flag: did you mean --no-strip-anthropic-preamble"),
            (("stray",), "stray: unknown flag: see --help"),
        ],
    )
    def test_an_unknown_flag_is_named_with_the_nearest(
        self, flags: tuple[str, ...], refused: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(["--model", "m", *flags])
        assert refused in capsys.readouterr().err.splitlines()[-1]

    def test_a_value_that_is_wrong_by_itself_is_named_with_its_line(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.write_text('model = "m"\n\nmax-queue = 0\n')
        with pytest.raises(SystemExit):
            parse_config(["--config", str(file)])
        assert f"{file}:3: --max-queue: expected at least 1, got 0" in capsys.readouterr().err


class TestVariables:
    def test_those_of_every_command_are_known_to_all(self) -> None:
        known = [variable(name) for config in CONFIGS for name, *_ in flags_of(config)]
        given = dict.fromkeys([*known, *OTHER_VARIABLES], "1")
        assert unknown_variable(given, known) is None
        assert unknown_variable(given | {"HOME": "/", "TOKENZEROS": "1"}, known) is None

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("TOKENZERO_SERVE_SVC_SERVICE_HOST", "10.0.0.1"),
            ("TOKENZERO_HEAD_SERVICE_PORT_GCS", "6379"),
            ("TOKENZERO_HEAD_PORT", "tcp://10.0.0.1:6379"),
            ("TOKENZERO_HEAD_PORT_6379_TCP_ADDR", "10.0.0.1"),
        ],
    )
    def test_those_that_kubernetes_sets_for_a_service_are_no_mistakes(self, name: str, text: str) -> None:
        assert unknown_variable({name: text}, []) is None


class TestShown:
    def shown(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--show-config"])
        assert not ended.value.code
        return capsys.readouterr().out

    def test_every_flag_is_there_with_its_place(
        self, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file.write_text('model = "m"\n')
        monkeypatch.setenv("TOKENZERO_MAX_QUEUE", "3")
        shown = self.shown(capsys, "--config", str(file), "--port", "9", "--dtype", "float32")
        for line in (
            f'model = "m"  # {file}:1',
            "max-queue = 3  # TOKENZERO_MAX_QUEUE",
            "port = 9  # --port",
            "page-size = 64  # default",
            "# max-model-len: not set: what the model and the KV pool allow",
        ):
            assert line in shown.splitlines()
        assert all(name.replace("_", "-") in shown for name, *_ in flags_of(ServerConfig) if "config" not in name)

    @pytest.mark.parametrize("command", ["serve", "cluster"])
    def test_what_is_shown_is_a_file_that_asks_for_the_same(
        self, command: str, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--model", 'a "b" \\ c', "--port", "9", "--store-bytes", "1.5GiB", "--no-strip-anthropic-preamble")
        shown = self.shown(capsys, command, *flags)
        file.write_text(shown)
        assert tomllib.loads(shown)["model"] == 'a "b" \\ c'
        again = self.shown(capsys, command, "--config", str(file))
        assert tomllib.loads(again) == tomllib.loads(shown)

    def test_no_secret_is(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKENZERO_UPSTREAM_API_KEY", "hunter2")
        shown = self.shown(capsys, "proxy", "--upstream", "http://me:hunter2@a", "--api-key", "hunter2")
        assert "hunter2" not in shown
        assert "# upstream-api-key: TOKENZERO_UPSTREAM_API_KEY, not shown" in shown
        assert 'upstream = ["http://***@a"]  # --upstream' in shown

    def test_a_wrong_value_is_shown_and_then_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--show-config", "--page-size", "0"])
        shown = capsys.readouterr()
        assert ended.value.code == 2
        assert "# model: missing" in shown.out
        assert "page-size = 0  # --page-size" in shown.out
        assert "--model: expected a value" in shown.err


def test_the_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    main(["--version"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"tokenzero {pyproject['project']['version']}, jax ")
