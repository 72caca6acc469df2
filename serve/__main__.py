"""The command line: `tokenzero COMMAND` or `python -m serve COMMAND`; flags without a command are the server's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache.private import write_for_this_user


class Command(NamedTuple):
    """A sub-command: what it does, in a line, and the function that runs it on the arguments after its name."""

    summary: str
    run: Callable[[Sequence[str]], int | None]  # the exit status, None for 0


# Each command imports its code when it runs, so that `explain` and `proxy` start without JAX.
def run_server(argv: Sequence[str]) -> None:
    """Serve a checkpoint."""
    from serve.server.cli import main
    from serve.server.config import parser

    cli = parser(program())
    cli.description = f"{cli.description}\n\ncommands:\n{command_list()}"
    main(argv, cli)


def run_explain(argv: Sequence[str]) -> None:
    """Compare captured requests."""
    from serve.diagnosis.cli import main

    main(argv)


def run_cluster(argv: Sequence[str]) -> None:
    """Serve a checkpoint with several engines."""
    from serve.cluster.cli import main
    from serve.cluster.config import parser

    main(argv, parser(f"{program()} cluster"))


def run_proxy(argv: Sequence[str]) -> None:
    """Serve the rules for another engine."""
    from serve.proxy.cli import main

    main(argv)


def run_cache(argv: Sequence[str]) -> int:
    """Look into a store of pages."""
    from cache.__main__ import main

    return main(argv)


def run_rules(argv: Sequence[str]) -> None:
    """List the rules."""
    import argparse

    from serve.web.flags import print_rules

    argparse.ArgumentParser(prog=f"{program()} rules", description=COMMANDS["rules"].summary).parse_args(argv)
    print_rules()


def run_audit(argv: Sequence[str]) -> None:
    """Replay a sequence that an audit found wrong."""
    from serve.audit.cli import main

    main(argv)


COMMANDS = {
    "serve": Command("serve a checkpoint; the default, so `--model DIR` alone does it", run_server),
    "cluster": Command("serve a checkpoint with several engines, on one machine or more", run_cluster),
    "explain": Command("where two captured requests diverge, and why", run_explain),
    "proxy": Command("apply the rules in front of another engine", run_proxy),
    "cache": Command("list, check or shrink a store of KV pages on disk", run_cache),
    "rules": Command("list the rules for prompts", run_rules),
    "audit": Command("replay a sequence that an audit found wrong", run_audit),
}


CONFIGURED = ("serve", "cluster", "proxy")  # the commands whose flags have variables


def refuse_unknown_variables() -> None:
    """End the process with a sentence for a variable of ours that is no command's."""
    from serve.cluster.config import ClusterConfig
    from serve.proxy.cli import ProxyConfig
    from serve.web.flags import flags_of
    from serve.web.settings import unknown_variable, variable

    known = [variable(name) for config in (ClusterConfig, ProxyConfig) for name, *_ in flags_of(config)]
    if problem := unknown_variable(os.environ, known):
        print(f"{program()}: error: {problem}", file=sys.stderr)
        sys.exit(2)


def program() -> str:
    """The command as it was called."""
    return "tokenzero" if os.path.basename(sys.argv[0]) == "tokenzero" else "python -m serve"


def command_list() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<9}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        f"`{program()} COMMAND --help` lists the flags of another command,",
        f"`{program()} --version` the versions.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, or the server if it names none."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given == ["--version"]:
        from serve.web.version import versions

        print(versions())
        return
    if given[:1] != ["explain"]:  # whose picture is for showing around
        write_for_this_user()
    name, arguments = (given[0], given[1:]) if given and given[0] in COMMANDS else ("serve", given)
    if name in CONFIGURED and any(variable.startswith("TOKENZERO_") for variable in os.environ):
        refuse_unknown_variables()
    if status := COMMANDS[name].run(arguments):
        sys.exit(status)


if __name__ == "__main__":
    main()
