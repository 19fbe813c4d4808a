"""``python -m peagle COMMAND``. This file imports nothing heavy, so that help answers at once."""

import os
import sys

from peagle import __version__

COMMANDS = {
    "fit": "capture the store if it is missing, train, validate, test, export, write the card",
    "plan": "what a run will cost: samples, disk, memory, steps, time; warnings",
    "validate": "per-depth accuracy of a checkpoint on all positions",
    "test": "acceptance length of a checkpoint by real speculative decoding, lossless check",
    "capture": "only the hidden-state store",
    "publish": "push a finished run to the Hub, or what a fit could not send",
    "export": "the servable folder of a checkpoint",
    "bench": "speed, latency and acceptance in vLLM, beside no drafter",
    "configs": "list the configurations that ship, with target and hardware; copy one",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m peagle COMMAND --config FILE_OR_NAME [--KEY VALUE ...]",
            "",
            *lines,
            "",
            "Each command explains its options with --help; --debug shows tracebacks.",
            "python -m peagle --version prints the version.",
        ]
    )


def search_working_directory_last() -> None:
    """A user's own classes are found there, but no file of theirs takes a library's name."""
    here = os.getcwd()
    sys.path[:] = [*(place for place in sys.path if place not in ("", here)), here]


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"peagle {__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        print(f"peagle: no command {command!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if command == "configs":  # without the seconds that the other commands take to start
            from peagle.shipped_configs import run as configs

            configs(arguments[1:])
        else:
            search_working_directory_last()
            from peagle.cli import run

            run(command, arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        from peagle.mistakes import is_mistake, sentence

        if debug or not is_mistake(error):
            raise
        print(f"peagle: {sentence(error)}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
