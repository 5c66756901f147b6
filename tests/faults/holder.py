"""A manager in a process of its own, to be killed: holds the board of a tree until told to end."""

import signal
import sys
import time
from pathlib import Path

from dynlib.hardware.control import SysFs
from dynlib.hardware.lease import LeaseError
from dynlib.hardware.live import LiveBoard
from dynlib.hardware.sysfs import find_knobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
root, folder, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
fs = SysFs(root)
try:
    with LiveBoard("fake", find_knobs(fs), fs, folder=folder, settle_s=0) as board:
        board.set("policy0", "governor", "userspace")
        board.set("policy0", "clock_mhz", 1200.0)
        board.set("policy2" if "policy2" in board.units else "policy1", "cores", 0)
        pid = board._lease._guardian.pid
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        if how == "raise":
            raise RuntimeError("in the loop")
        time.sleep(30)
except LeaseError as error:
    sys.exit(f"LeaseError: {error}")
