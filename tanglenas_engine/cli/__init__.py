"""The command `tanglenas`: a module for each command, imported when the command is used.

Modules import torch and the like inside their functions, so that `tanglenas --help` loads none of them.
"""

import importlib
from typing import Any

import click

from tanglenas_engine.errors import TangleNASError, print_anything, readable

COMMANDS = (
    "init",
    "plugins",
    "new-plugin",
    "show",
    "export",
    "predict",
    "latency",
    "tables",
    "pool",
    "compare",
    "study",
    "report",
    "doctor",
)


class WrongInput(click.ClickException):
    """A TangleNASError, as click shows it."""

    exit_code = 2


class Commands(click.Group):
    """A group that imports a command when it is used, and tells wrong input in one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS and name not in self.commands:
            module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
            self.add_command(module.command, name)
        return super().get_command(ctx, name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS:  # click suggests the closest of the commands that are loaded
            for name in COMMANDS:
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        print_anything()
        try:
            return super().invoke(ctx)
        except TangleNASError as error:
            raise WrongInput(readable(error)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise WrongInput(f"{error.filename}: {error.strerror or error}. Name another file or folder") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tanglenas", prog_name="tanglenas")
def main() -> None:
    """Architecture search over weight-entangled spaces."""
