"""The command ``pwff``: loads a subcommand's package when it is called, puts errors in words.

An exception with an ``exit_code`` is meant for a person: its sentence is printed without a
traceback, and the command ends with that code (1 the run failed, 2 bad input).
"""

from __future__ import annotations

import importlib
import os
import sys

import click

COMMANDS = {
    "emulate": ("cloud_aggregator.cli", "a fleet on this machine: broker, aggregator, devices"),
    "aggregator": ("cloud_aggregator.cli", "the cloud side of a real run"),
    "client": ("edge_client.cli", "the device side of a real run"),
    "reproduce": ("cloud_aggregator.reproduce.command", "the paper's comparison, all methods"),
    "simulate": ("cloud_aggregator.simulation.command", "a large fleet in virtual time, untrained"),
    "export": ("edge_client.export_command", "a personal model, for transformers or ONNX Runtime"),
    "generate": ("edge_client.talk_command", "one answer of a personal model"),
    "chat": ("edge_client.talk_command", "talk to a personal model"),
    "prefer": ("edge_client.prefer_command", "rank two answers of the device's own model"),
    "report": ("cloud_aggregator.cli", "report.html of one run, or a comparison of several"),
    "devices": ("edge_client.devices_command", "which devices are known, what each would do"),
    "certs": ("cloud_aggregator.certs_command", "certificates, keys and rules of a deployment"),
    "doctor": ("edge_client.cli", "what is installed, what works, what to install"),
    "pretrain": ("edge_client.cli", "train a small GPT-2 base from text files"),
}

EXTRAS = frozenset({"torch", "transformers", "peft", "sklearn", "tokenizers"})


class _Lazy(click.Group):
    """Subcommands that are imported when they are called, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a newcomer needs them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the subcommand, its package imported now."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        package, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(package), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pwff", message="pwff %(version)s")
def command() -> None:
    """Personalised wireless federated fine-tuning of language models over MQTT.

    Begin with `pwff emulate`, or `pwff doctor` if something does not work.
    """


def main() -> None:
    """Run the command and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] == ["emulate"]:
        # half a second before the command itself is imported: what workers are made of takes long
        from cloud_aggregator.emulation.nursery import prepare

        prepare(sys.argv[2:])
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        click.echo(f"error: {missing} is not installed: pip install 'pwff[edge]'", err=True)
        sys.exit(1)
    except Exception as err:
        exit_code = getattr(err, "exit_code", None)
        if not isinstance(exit_code, int):
            raise
        click.echo(f"error: {err}", err=True)
        sys.exit(exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
