"""``python -m compress``, and the command ``compress``.

While the command line is imported nothing is to be kept or cleaned up: a Ctrl-C then ends the process by itself,
without a traceback. One that is ignored, as nohup has it, stays so.
"""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from compress.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
