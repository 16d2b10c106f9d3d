"""`python -m minisgl.launch [MODEL]`: serve a model to OpenAI clients."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from minisgl import builtin
from minisgl.cli import add_engine_arguments, engine_config
from stages import load_stage
from stages.interface import EngineFailed, SamplingParams

logger = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  python -m minisgl.launch                         the built-in model, on this machine only
  python -m minisgl.launch Qwen/Qwen3-0.6B         a model from the Hugging Face hub
  python -m minisgl.launch ./my-model --port 8000  a model from a folder, on another port
  python -m minisgl.launch --host 0.0.0.0          for the whole network (there is no password)
  python -m minisgl.launch --stage 1 --help        the flags of stage 1's engine

Then point any OpenAI client at http://127.0.0.1:1919/v1; every API key is accepted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 when told to stop, 1 after an error, which is on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same way out as Ctrl-C
    try:
        args = _parse(argv)
        logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        return _run(args)
    except KeyboardInterrupt:
        return 0


def _run(args: argparse.Namespace) -> int:
    # Imported late: the engine process imports this module once more, and does not need it.
    from minisgl.server.main import ServerOptions, run_server

    name = args.model_name or (_last_component(args.model) if args.model else builtin.NAME)
    options = ServerOptions(
        args.host, args.port, name, args.log_level, args.max_body_mb, args.sampling_defaults == "model"
    )
    try:
        if os.environ.get("RANK", "0") != "0":  # under torchrun one process serves, and the others help it
            load_stage(args.stage).build(engine_config(args))
        elif args.shell:
            from minisgl.shell import chat

            given = {} if args.sampling_defaults == "model" else vars(SamplingParams())
            chat(engine_config(args), args.stage, given)
        else:
            run_server(args.stage, engine_config(args), options)
    except (ValueError, OSError, EngineFailed) as error:
        logger.debug("the traceback", exc_info=error)
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library wrote
        return 1
    return 0


def _last_component(model: str) -> str:
    return os.path.basename(os.path.abspath(model))  # also of "." and "models/tiny/"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minisgl.launch",
        description="Serve a language model over HTTP, to OpenAI clients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument(
        "--port",
        type=_port,
        default=1919,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    server.add_argument(
        "--model-name", metavar="NAME", help="what clients call the model (default: the last part of MODEL)"
    )
    server.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="debug also logs every HTTP request (default: %(default)s)",
    )
    server.add_argument(
        "--max-body-mb",
        type=_size,
        default=32,
        metavar="INT",
        help="refuse requests with larger bodies, in MiB (default: %(default)s)",
    )
    server.add_argument(
        "--sampling-defaults",
        default="model",
        choices=["model", "openai"],
        help="where temperature, top_p, top_k, min_p and repetition_penalty come from if a request leaves "
        "them out: the model's generation_config.json, or OpenAI's defaults (default: %(default)s)",
    )
    server.add_argument("--shell", action="store_true", help="chat in this terminal instead of serving")
    add_engine_arguments(parser, argv)
    return parser.parse_args(argv)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"a port is from 0 to 65535, not {number}")
    return number


def _size(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a size is at least 1, not {number}")
    return number


if __name__ == "__main__":
    status = main()
    if threading.active_count() > 1:  # one that tokenizes a long text would be waited for
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
