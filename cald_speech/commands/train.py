"""``cald-speech train``: an experiment's yaml to a model, by the recipe that it names."""

import click

from cald_speech.commands.options import Command, command
from cald_speech.training import command_line, run


class Train(Command):
    """Its help ends with every key of an experiment."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{command_line.help_text()}")


@command(cls=Train, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("experiment")
@click.argument("keys", metavar="[--KEY VALUE]...", nargs=-1, type=click.UNPROCESSED)
def train(experiment: str, keys: tuple[str, ...]) -> None:
    """Train what EXPERIMENT says, a yaml of your own or one that ships, such as hparams/mamba.yaml.

    Every --KEY VALUE after it stands in for that key of the yaml: --data_folder DIR, --guidance hybrid, --num_steps
    1000. A run that was stopped goes on from its checkpoint when it is called again in the same way.
    """
    run.train([experiment, *keys])
