"""The command line: ``python -m suite.run``."""

import signal
import sys

from suite.run.cli import main


def _stop(number: int, _frame: object) -> None:
    # As an exception, so that kernels are stopped and earlier results put back on the way out.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
