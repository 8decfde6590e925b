"""Programs with sub-commands: `add_commands(parser)`, then `add_command(...)` for each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


class CommandParser(common.Parser):
    """The parser of one sub-command; argparse gives it the name of the program."""

    def __init__(self, doc: str, prog: str, **options):
        super().__init__(doc)
        self.usage = prog.replace(" [flags]", "") + " [flags]"


def add_commands(parser: common.Parser, name: str):
    """What add_command takes; the chosen sub-command will be args.<name>."""
    return parser.add_subparsers(
        dest=name,
        required=True,
        metavar=name.upper(),
        parser_class=CommandParser,
    )


def add_command(commands, name: str, doc: str):
    """Add a sub-command: -> the add_argument of its parser."""
    return commands.add_parser(name, doc=doc, help=doc).add_argument
