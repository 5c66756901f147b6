"""A manager in a process of its own, to be killed: holds a tree's machine until told to end."""

import signal
import sys
import time
from pathlib import Path

from dynlib.errors import MachineError
from dynlib.machine.knobs import find_knobs
from dynlib.machine.machine import Machine
from dynlib.sysfs import SysFs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
root, how = Path(sys.argv[1]), sys.argv[3]
folder = Path(sys.argv[2]) if sys.argv[2] else None
fs = SysFs(root)
try:
    with Machine("fake", find_knobs(fs), fs, folder=folder, settle_s=0) as machine:
        machine.set("policy0", "governor", "userspace")
        machine.set("policy0", "clock_mhz", 1200.0)
        machine.set("policy2" if "policy2" in machine.units else "policy1", "cores", 0)
        pid = machine._lease.guardian_pid
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        if how == "raise":
            raise RuntimeError("in the loop")
        time.sleep(30)
except MachineError as error:
    sys.exit(f"MachineError: {error}")
