"""The ``lmppo`` command; ``python -m lmppo`` is the same."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        arguments: The command line (default: that of the process).
    """
    parser = argparse.ArgumentParser(prog="lmppo", description="Token-level PPO with a critic for language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_explain(commands)
    args = parser.parse_args(arguments)
    args.run_command(args)


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain",
        help="show completions token by token: values, rewards, advantages, ratios",
        description="Show the completions saved with a checkpoint (save_rollouts=N), token by token.",
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint (default: the newest with saved rollouts)"
    )
    parser.add_argument("--row", type=int, nargs="+", metavar="I", help="completions, counted from 0 (default: all)")
    parser.add_argument("--format", choices=("html", "table", "json"), default="html", help="default: html")
    parser.add_argument("--html", metavar="PATH", help="where to write the page (default: RUN/explain-step-N.html)")
    parser.set_defaults(run_command=lambda args: _explain(parser, args))


def _explain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.html is not None and args.format != "html":
        parser.error(f"--html names the page's file; it does not go with --format {args.format}.")
    from lmppo.explain import explain
    from lmppo.run.checkpoint import CheckpointError  # late: --help need not wait for torch

    try:
        page = explain(args.run, step=args.step, rows=args.row, format=args.format, html=args.html)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"lmppo explain: {error}") from error
    if page is not None:
        print(page)
