"""The command line: its help, what it refuses and how it says so."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cache.sizes import parse_bytes
from experiments.harness.server import running_server
from model import checkpoint
from model.config import ModelConfig
from model.params import Params
from serve.__main__ import COMMANDS, main
from serve.engine.settings import EngineSettings
from serve.prompt.tokenizer import Tokenizer
from serve.rules.normalize import RULES
from serve.server import loading
from serve.server.config import ServerConfig, parse_config, parser, problem_of
from serve.server.progress import StartProgress
from serve.server.sizing import DEVICE_MARGIN_BYTES, engine_settings, mesh_of, pool_bytes
from serve.web.flags import is_loopback
from serve.web.settings import read_config
from tests.helpers.http import CONTEXT


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The last line that the command prints when it refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nowhere", *flags])
    assert ended.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 2, "a line of usage and a line that says what is wrong"
    return shown[-1]


def config_of(*flags: str) -> ServerConfig:
    """The configuration of a server with these flags."""
    return parse_config(["--model", "m", *flags])


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[ModelConfig, Params]:
    """The tiny checkpoint."""
    return checkpoint.load(model_folder, jnp.dtype("float32"))


class TestHelp:
    @pytest.fixture
    def shown(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    def test_it_fits_a_terminal_of_80_columns(self, shown: str) -> None:
        assert max(map(len, shown.splitlines())) < 80

    def test_it_names_every_flag_with_a_description(self, shown: str) -> None:
        for flag in (
            *("--model", "--port", "--host", "--api-key", "--dtype", "--max-model-len", "--kv-pool-bytes"),
            *("--strip-anthropic-preamble", "--no-strip-anthropic-preamble", "--max-queue"),
        ):
            assert flag in shown
        assert all(action.help for action in parser()._actions)

    def test_it_lists_the_commands_with_a_line_each(self, shown: str) -> None:
        listed = dict(re.findall(r"^  (\w+) +(\S.*)$", shown, re.MULTILINE))
        assert all(listed[name] == command.summary for name, command in COMMANDS.items())

    def test_no_default_is_shown_as_none_or_twice(self, shown: str) -> None:
        assert "None" not in shown
        assert "(default: 127.0.0.1)" in shown
        assert all(entry.count("default") <= 1 for entry in shown.split("\n  --"))


class TestFlags:
    def test_stripping_is_on_unless_it_is_turned_off(self) -> None:
        assert config_of().strip_anthropic_preamble is True
        assert config_of("--strip-anthropic-preamble").strip_anthropic_preamble is True
        assert config_of("--no-strip-anthropic-preamble").strip_anthropic_preamble is False

    def test_a_configuration_without_flags_is_what_the_command_line_makes_of_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TOKENZERO_API_KEY", raising=False)
        assert config_of() == ServerConfig(model="m")
        assert config_of().no_prompt_text_in_reports is False
        assert config_of("--no-prompt-text-in-reports").no_prompt_text_in_reports is True

    def test_the_defaults_are_the_engines_own(self) -> None:
        config, own = config_of(), EngineSettings(num_pages=2, max_model_len=2)
        for name in ("page_size", "max_num_seqs", "max_queue", "max_prefill_tokens"):
            assert getattr(config, name) == getattr(own, name)

    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), ("4096", 4096), ("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), (" 2kb ", 2000)],
    )
    def test_sizes_are_read_in_both_kinds_of_units(self, text: str, size: int) -> None:
        assert parse_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "-1", "4 GiB more", "4XB", "1e9"])
    def test_what_is_not_a_size_is_refused(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 4GB"):
            parse_bytes(text)

    def test_without_a_model_the_flag_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([])
        assert "--model" in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("flags", "error"),
        [
            (["--kv-pool-bytes", "lots"], "--kv-pool-bytes: expected a size such as 4GB or 512MiB, got 'lots'"),
            (["--page-size", "0"], "--page-size: expected at least 1, got 0"),
            (["--max-num-seqs", "-1"], "--max-num-seqs: expected at least 1, got -1"),
            (["--max-queue", "0"], "--max-queue: expected at least 1, got 0"),
            (["--max-prefill-tokens", "0"], "--max-prefill-tokens: expected at least 1, got 0"),
            (["--speculative-tokens", "16"], "--speculative-tokens: expected 0 to 15, got 16"),
            (["--tp", "0"], "--tp: expected at least 1, got 0"),
            (["--max-model-len", "1"], "--max-model-len: expected at least 2, got 1"),
            (["--max-model-len", "many"], "--max-model-len: invalid int value: 'many'"),
            (["--port", "65536"], "--port: expected 0 to 65535, got 65536"),
            (["--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
            (["--nonsense"], "--nonsense"),
        ],
    )
    def test_a_bad_flag_is_named_with_what_was_expected(
        self, flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert error in refusal(capsys, *flags)


class TestCommands:
    def test_each_command_shows_its_own_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        for name, flag in (
            *(("serve", "--page-size"), ("explain", "--svg"), ("proxy", "--upstream"), ("cache", "verify")),
            *(("rules", "--help"), ("audit", "FILE"), ("cluster", "--replicas")),
        ):
            with pytest.raises(SystemExit) as ended:
                main([name, "--help"])
            assert ended.value.code == 0
            assert flag in capsys.readouterr().out
        assert COMMANDS.keys() == {"serve", "cluster", "explain", "proxy", "cache", "rules", "audit"}

    def test_serve_may_be_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["serve", "--model", "m", "--page-size", "0"])
        assert "--page-size: expected at least 1, got 0" in capsys.readouterr().err

    def test_rules_lists_every_rule(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["rules"])
        shown = capsys.readouterr().out
        assert all(name in shown for name in RULES)

    def test_the_exit_status_is_the_commands_own(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["cache", "stats", "--store", str(tmp_path)])
        assert ended.value.code == 2

    @pytest.mark.parametrize("arguments", [("-c", "import serve.proxy.cli"), ("-m", "serve", "proxy", "--help")])
    def test_the_proxy_starts_without_the_engines_libraries(self, arguments: tuple[str, ...]) -> None:
        heavy = {"jax", "flax", "llguidance", "tensorstore", "prometheus_client"}
        ran = subprocess.run(
            [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        imported = set(re.findall(r"\| +([\w.]+)$", ran.stderr, re.MULTILINE))
        assert "serve.proxy.cli" in imported or arguments[0] == "-c"
        assert "serve.proxy.app" in imported
        assert not imported & heavy


class TestBinding:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org"])
    def test_without_a_key_only_loopback_is_bound(
        self, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TOKENZERO_API_KEY", raising=False)
        error = refusal(capsys, "--host", host)
        assert f"--host {host} is reachable from elsewhere: give an --api-key" in error

    @pytest.mark.parametrize(
        "flags", [["--host", "0.0.0.0", "--api-key", "k"], ["--host", "::1"], ["--host", "localhost"]]
    )
    def test_a_key_or_loopback_is_enough(self, flags: list[str]) -> None:
        assert problem_of(read_config(ServerConfig, parser().parse_args(["--model", "m", *flags]))) is None

    def test_an_empty_key_is_no_key(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKENZERO_API_KEY", "")
        assert "give an --api-key" in refusal(capsys, "--host", "0.0.0.0", "--api-key", "")

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [
            ("127.0.0.1", True),
            ("127.8.8.8", True),
            ("::1", True),
            ("localhost", True),
            ("0.0.0.0", False),
            ("a.b", False),
        ],
    )
    def test_loopback_is_distinguished_from_the_rest(self, host: str, loopback: bool) -> None:
        assert is_loopback(host) is loopback


class TestSizes:
    @staticmethod
    def sized(loaded: tuple[ModelConfig, Params], *flags: str) -> EngineSettings:
        return engine_settings(config_of(*flags), *loaded, "float32")

    def test_the_pool_holds_as_many_pages_as_its_bytes_allow(self, loaded: tuple[ModelConfig, Params]) -> None:
        # 2 layers, 2 heads of 16, keys and values of 4 bytes: 512 bytes a token.
        sizes = self.sized(loaded, "--kv-pool-bytes", "1MiB", "--page-size", "16")
        assert (sizes.num_pages, sizes.page_size, sizes.dtype) == (128, 16, "float32")
        assert sizes.max_model_len == 127 * 16, "one page is kept for a copy"

    def test_the_context_is_the_models_where_the_pool_is_large(self, loaded: tuple[ModelConfig, Params]) -> None:
        assert self.sized(loaded, "--kv-pool-bytes", "64MiB").max_model_len == 16_384
        assert self.sized(loaded, "--kv-pool-bytes", "64MiB", "--max-model-len", "100").max_model_len == 100

    def test_small_prefill_chunks_bound_the_mixed_ones(self, loaded: tuple[ModelConfig, Params]) -> None:
        assert (
            self.sized(loaded, "--kv-pool-bytes", "1MiB", "--max-prefill-tokens", "32").max_mixed_prefill_tokens == 32
        )
        assert self.sized(loaded, "--kv-pool-bytes", "1MiB", "--speculative-tokens", "4").speculative_tokens == 4

    def test_the_auditor_has_a_small_share_of_the_pages_and_none_of_a_context_that_was_asked_for(
        self, loaded: tuple[ModelConfig, Params]
    ) -> None:
        flags = ("--kv-pool-bytes", "8MiB", "--page-size", "16")
        sizes = self.sized(loaded, *flags)
        assert (sizes.num_pages, sizes.audit_pages) == (1024 - 16, 16)
        assert sizes.max_model_len == 1007 * 16
        sizes = self.sized(loaded, *flags, "--max-model-len", str(1023 * 16))
        assert (sizes.num_pages, sizes.audit_pages) == (1024, 0)
        assert self.sized(loaded, *flags, "--audit-share", "0").audit_pages == 0

    @pytest.mark.parametrize("flags", [["--kv-pool-bytes", "1MiB"], ["--kv-pool-bytes", "64MiB"]])
    def test_a_context_that_does_not_fit_is_refused_with_both_limits(
        self, flags: list[str], loaded: tuple[ModelConfig, Params]
    ) -> None:
        with pytest.raises(
            SystemExit, match=r"--max-model-len: got 20000, but the model takes 16384 tokens and the KV"
        ):
            self.sized(loaded, *flags, "--max-model-len", "20000")

    @pytest.mark.parametrize("size", ["0", "1000"])
    def test_a_pool_of_less_than_two_pages_is_refused(self, size: str, loaded: tuple[ModelConfig, Params]) -> None:
        with pytest.raises(SystemExit, match=f"--kv-pool-bytes: {size} bytes hold 0 pages of 32768 bytes"):
            self.sized(loaded, "--kv-pool-bytes", size)

    def test_devices_that_do_not_exist_or_divide_the_heads_are_refused_with_what_works(
        self, loaded: tuple[ModelConfig, Params]
    ) -> None:
        with pytest.raises(ValueError, match=r"^--tp: a model of 4 query heads, .* over 3 devices: use 1, 2 or 4$"):
            mesh_of(loaded[0], 3)
        with pytest.raises(ValueError, match=r"^--tp: 4 devices .*, 1 are there .*force_host_platform_device_count=4$"):
            mesh_of(loaded[0], 4)
        assert mesh_of(loaded[0], 1) is None

    def test_a_pool_on_gpus_is_what_the_smallest_leaves_on_each(self) -> None:
        class Gpu:
            platform = "gpu"

            def __init__(self, limit: int) -> None:
                self.limit = limit

            def memory_stats(self) -> dict[str, int]:
                return {"bytes_limit": self.limit}

        free = 5 << 30
        assert pool_bytes([Gpu(DEVICE_MARGIN_BYTES + free + 7)], 7) == free
        assert pool_bytes([Gpu(1 << 40), Gpu(DEVICE_MARGIN_BYTES + free + 7)], 7) == 2 * free
        assert pool_bytes([Gpu(1)] * 4, 7) == 0

    def test_pages_in_eight_bits_are_more_in_as_many_bytes(self, loaded: tuple[ModelConfig, Params]) -> None:
        flags = ("--kv-pool-bytes", "1MiB", "--page-size", "16")
        assert self.sized(loaded, *flags, "--kv-dtype", "int8").page_dtype == "int8"
        # A key or value of a head has 16 bytes and a scale of 2, instead of 64.
        sizes = [self.sized(loaded, *flags, "--kv-dtype", kind) for kind in ("int8", "fp8")]
        assert [each.num_pages + each.audit_pages for each in sizes] == [455, 455]

    def test_a_model_that_is_too_big_is_refused_before_its_weights_are_read(
        self, model_folder: Path, loaded: tuple[ModelConfig, Params], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = checkpoint.planned_bytes(model_folder, jnp.dtype("float32"))
        assert weights == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded[1]))
        monkeypatch.setattr(loading, "device_bytes", lambda devices: weights)
        monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("weights are read"))
        expected = r"of weights and 64\.0 KiB of KV pages on a device, .* more than .*: it fits with --quantize int8 or"
        with pytest.raises(ValueError, match=expected):
            loading.load_model(config_of(), model_folder, StartProgress())
        monkeypatch.setattr(loading, "device_bytes", lambda devices: 1_000)
        with pytest.raises(ValueError, match=r"no --quantize, --kv-dtype or --max-model-len makes it fit"):
            loading.load_model(config_of(), model_folder, StartProgress())


class TestStarting:
    def test_devices_that_do_not_divide_the_heads_end_the_process_with_a_sentence(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        with (
            pytest.raises(RuntimeError, match="status 1 ") as ended,
            running_server(model_folder, "--tp", "3", log=tmp_path / "l"),
        ):
            pass
        assert "tokenzero: --tp: a model of 4 query heads" in str(ended.value)
        assert "Traceback" not in str(ended.value)

    def test_a_context_beyond_the_pool_ends_the_process_with_a_sentence(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "served.toml"
        file.write_text(f"max-model-len = {CONTEXT}\n")
        flags = ("--config", str(file), "--kv-pool-bytes", "1MiB")
        with (
            pytest.raises(RuntimeError, match="status 1 ") as ended,
            running_server(model_folder, *flags, log=tmp_path / "l"),
        ):
            pass
        assert f"{file}:1: --max-model-len: got {CONTEXT}" in str(ended.value)
        assert "Traceback" not in str(ended.value)

    def test_a_tokenizer_of_another_model_is_refused(self, model_folder: Path, tokenizer: Tokenizer) -> None:
        size = tokenizer.hf.vocab_size
        loading.check_vocabulary(tokenizer.hf, size, model_folder)
        with pytest.raises(ValueError, match=rf"tokenizer has {size} tokens, expected at most .* of {size - 1}"):
            loading.check_vocabulary(tokenizer.hf, size - 1, model_folder)

    @pytest.mark.parametrize("content", [None, "{}", '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}'])
    def test_a_folder_that_is_no_checkpoint_ends_it_with_a_sentence(
        self, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "set_up_jax", lambda: None)  # it would stay so for every later test
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(tmp_path)])
        assert str(ended.value).startswith("tokenzero: ")
        assert str(tmp_path) in str(ended.value)
