"""One papermill run in a process of its own, so that its limit can end it together with its kernel.

Reads its job, a line of JSON, from standard input, and stops when that closes: a suite that was
killed leaves nothing behind that still computes.
"""

import json
import os
import sys
import threading

import psutil


def kill_tree(pid: int) -> None:
    """Kill a process and all it started; a kernel leads its own session, so no group has all."""
    try:
        root = psutil.Process(pid)
        victims = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=10)


def _die_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock the interpreter wants when it ends
    kill_tree(os.getpid())


def main() -> None:
    """Run the notebook; papermill's exception, if any, ends up on standard error."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()

    from papermill import execute_notebook

    execute_notebook(
        job["notebook"],
        job["executed"],
        parameters=job["parameters"],
        kernel_name="python3",
        language="python",
        cwd=job["root"],
        progress_bar=False,
        start_timeout=120,
        execution_timeout=job["cell_limit_s"],
    )


if __name__ == "__main__":
    main()
