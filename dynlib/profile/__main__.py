"""`python -m dynlib.profile mine.toml` writes a board file of this machine.

It prints what the machine has and what it lacks.
"""

import argparse
import sys
from pathlib import Path

from dynlib.errors import DynlibError
from dynlib.machine.bind import open_machine
from dynlib.profile.describing import describe, write_template


def main(arguments: list[str] | None = None) -> int:
    """Write the file; the exit status. One that exists is left as it is."""
    parser = argparse.ArgumentParser(prog="python -m dynlib.profile", description=__doc__)
    parser.add_argument("file", type=Path, help="the board file to write")
    file = parser.parse_args(arguments).file
    if file.exists():
        parser.error(f"{file} exists; give another name, or remove it")
    machine = open_machine("auto")
    try:
        write_template(machine, file)
    except (DynlibError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{describe(machine).to_string(index=False)}\n{file} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
