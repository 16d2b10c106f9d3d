"""The command line of the benchmarks."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from stages.interface import EngineFailed

_COMMANDS = {
    "offline": "named workloads in this process, each beside the machine's limit",
    "stages": "the same workload through every stage",
    "ablate": "stage 5 with one part taken out at a time",
    "kernels": "every fused kernel of stage 5 alone",
    "collectives": "what the ranks of stage 6 say to each other, alone",
    "online": "load on any OpenAI-compatible server",
    "radix": "the radix tree alone",
    "compare": "two result files side by side",
    "weights": "a folder of a known shape, to serve with --random-weights and without a download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; a user's mistake is one line on stderr, and 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    program = "python -m minisgl.bench"
    if not argv or argv[0] not in _COMMANDS:
        lines = "\n".join(f"  {name:<9} {about}" for name, about in _COMMANDS.items())
        print(f"usage: {program} COMMAND ...\n\n{__doc__}\n\n{lines}\n\n{program} COMMAND --help tells more")
        return 0 if argv in (["--help"], ["-h"]) else 2
    name, rest = argv[0], argv[1:]
    parser = argparse.ArgumentParser(
        prog=f"{program} {name}",
        description=_COMMANDS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        _run(name, parser, rest)
        return 0
    except (ValueError, OSError, EngineFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(name: str, parser: argparse.ArgumentParser, rest: list[str]) -> None:
    if name in ("offline", "stages", "ablate"):  # imported late: they need torch
        from minisgl.bench import offline

        offline.add_arguments(parser, rest, name)
        runs = {"offline": offline.run_offline, "stages": offline.run_stages, "ablate": offline.run_ablate}
        run = runs[name]
    else:
        module = import_module(f"minisgl.bench.{'shapes' if name == 'weights' else name}")
        module.add_arguments(parser)
        run = module.run
    run(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main())
