"""The command line: thin subcommands, each a call of functions that a notebook can call as well."""

import sys

from spd.cli import ablations, latency, method, recovery, reports, reproduction  # noqa: F401  (each adds commands)
from spd.cli.app import app
from spd.errors import SPDError


def main() -> None:
    """Runs a command; a mistake of the user's ends as one sentence on stderr and exit code 1."""
    from spd.launch import environment_rank

    try:
        sys.exit(app(standalone_mode=False))
    except SPDError as error:
        who = f"rank {environment_rank()}: " if environment_rank() else ""
        sys.exit(f"{who}{error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a wrong option, with the usage
        sys.exit(error.exit_code)
