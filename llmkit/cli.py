"""`llmkit <command>`: parses and dispatches. Imports nothing heavy before it must, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from llmkit.commands import folders, judging, looking, measuring, pipeline, recipes, reporting, writing

USER_MISTAKE, STOPPED_ITSELF, INTERRUPTED = 2, 3, 130
EXIT_CODES = """exit codes:
  0   done
  1   a fault of llmkit or of the machine
  2   your mistake: the message says which, and how to mend it
  3   training stopped itself: a loss or gradient was not finite, or the guard's limits were reached
  75  stopped by a signal after saving: start again to go on
  130 interrupted by Ctrl-C"""
# What the system says of a path that can't be used as it is named. Anything else about files is the machine's fault.
_BAD_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


class _Parser(argparse.ArgumentParser):
    """Takes `key=value` also behind options, which argparse by itself doesn't."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if odd := [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(found, "overrides")]:
            self.error(f"unrecognized arguments: {' '.join(odd)}")
        if rest:
            found.overrides = [*found.overrides, *rest]
        return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="llmkit",
        description="Trains language models from YAML recipes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="command", dest="command")
    for module in (recipes, pipeline, writing, judging, measuring, looking, reporting, folders):
        module.add(commands)
    return parser


def _speak_utf8() -> list[str]:
    """Makes the terminal's streams take any text, and returns the arguments as text: UTF-8 whatever the locale says."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):  # replaced by something simpler, or closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]]


def _explain(error: Exception) -> tuple[str, int] | None:
    """One sentence and the exit code for an error that is nobody's bug; None for a bug, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        what = f"{error.object!r} can't be written in the locale's encoding, {error.encoding}"
        return f"{what}: set LC_ALL=C.UTF-8", USER_MISTAKE
    if isinstance(error, OSError) and error.strerror and error.errno != errno.ENOENT:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", USER_MISTAKE if error.errno in _BAD_PATH else 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"out of memory: lower batch.micro_tokens, or choose a smaller model: {text or type(error).__name__}", 1
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(_speak_utf8() if argv is None else argv)
    if args.version:
        from importlib.metadata import version

        print(version("llmkit"))
        return 0
    if args.command is None:
        parser.print_help()
        return USER_MISTAKE
    from llmkit.config import MachineError, TrainingStopped, UserError

    try:
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do when it fails
        return code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_MISTAKE
    except MachineError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it once more at its end
        if args.command != "train":
            return 0
        print("error: the reader of the output has left: start again to go on, with output to a file", file=sys.stderr)
        return 1
    except TrainingStopped as e:
        print(f"error: {e}", file=sys.stderr)
        return STOPPED_ITSELF
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as e:
        explained = _explain(e)
        if explained is None:
            raise
        print(f"error: {explained[0]}", file=sys.stderr)
        return explained[1]


if __name__ == "__main__":
    sys.exit(main())
