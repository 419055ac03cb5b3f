"""One worker of a search in a process of its own: ``python -m peftbench.search <arguments of search>``."""

import sys

from peftbench.errors import UserError
from peftbench.search.prepare import prepare
from peftbench.search.work import Worker
from peftbench.sweep import say


def main(arguments: list[str]) -> int:
    """Work until all trials are done; returns the exit code."""
    quiet = "--quiet" in arguments
    try:
        prepared = prepare([a for a in arguments if a != "--quiet"])
        Worker(prepared, quiet, alone=False, tell=(lambda line: None) if quiet else say).work()
    except UserError as error:
        print(f"peftbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
