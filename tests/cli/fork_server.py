"""``python -m tests.cli.fork_server``: one case per line of stdin; each is the command line in a forked child.

Exit code, stdout and stderr are the real ones, and torch is imported once for all of them. A case may say at which of
its changes to files the child dies, as kill -9 would end it, or where to write how many there were.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import compress.api  # noqa: F401 - so that no child imports torch
from compress.cli.main import main
from compress.exporters.translation import operator_table

_CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Changes:
    """Changes to files under the current folder, counted before they are made; at number ``last`` the process dies.

    Python tells an audit hook of them. What torch and safetensors write by themselves it does not know of, but of what
    is done before and after it.
    """

    def __init__(self, last: int) -> None:
        self.last, self.count, self.folder = last, 0, os.getcwd()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "open" and not args[2] & _WRITES):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if not os.path.abspath(path).startswith(self.folder):
            return
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def run(case: dict[str, Any]) -> None:
    """The child: never returns."""
    os.chdir(case["cwd"])
    os.environ.update(case["variables"])
    for descriptor, name in ((0, os.devnull), (1, case["stdout"]), (2, case["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv = ["compress", *case["arguments"]]
    changes = Changes(-1 if case["dies_at"] is None else case["dies_at"])
    if case["dies_at"] is not None or case["counts_to"]:
        sys.addaudithook(changes)
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    if case["counts_to"]:
        Path(case["counts_to"]).write_text(str(changes.count))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking a large interpreter apart takes a second and more


if __name__ == "__main__":
    operator_table()
    gc.freeze()  # a child's collections would copy it all
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
