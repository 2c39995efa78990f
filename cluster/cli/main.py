"""Entry point of the ``warmgraph`` command: puts the sub-commands together and prints users' errors.

Every sub-command imports what it needs when it runs, so that ``warmgraph --help`` and ``config check`` answer at
once.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from cluster.cli import analyze as analyze_command
from cluster.cli import artifacts as artifacts_command
from cluster.cli import bench as bench_command
from cluster.cli import compile as compile_command
from cluster.cli import config as config_command
from cluster.cli import diagnose as diagnose_command
from cluster.cli import graphs as graphs_command
from cluster.cli import k8s as k8s_command
from cluster.cli import model as model_command
from cluster.cli import serve as serve_command
from cluster.cli import startup as startup_command
from cluster.cli import verify_graphs as verify_graphs_command
from cluster.cli import warm as warm_command
from workers.errors import UserError, WarmgraphError

app = typer.Typer(
    name="warmgraph",
    help="A Ray Serve cluster for large language models whose replicas start warm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve_command.serve)
app.command("warm")(warm_command.warm)
app.command("diagnose")(diagnose_command.diagnose)
app.command("verify-graphs")(verify_graphs_command.verify_graphs)
app.add_typer(analyze_command.app)
app.add_typer(artifacts_command.app)
app.add_typer(bench_command.app)
app.add_typer(compile_command.app)
app.add_typer(config_command.app)
app.add_typer(graphs_command.app)
app.add_typer(k8s_command.app)
app.add_typer(model_command.app)
app.add_typer(startup_command.app)


def main() -> None:
    """Run the command. What goes wrong ends in one sentence on standard error.

    Exit status 2 is a user's mistake; 1 is anything else that was foreseen, such as a compiler that fails.
    """
    try:
        app()
    except WarmgraphError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
