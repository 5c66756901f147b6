"""What a bundle costs in memory and time, against plain sessions of ONNX Runtime."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.deploy.runner import Runner
from dynlib.profile.timing import paired_ratio

# In a process of its own: what was freed there earlier cannot be used again.
_LOAD = """
import json, sys
from pathlib import Path
from dynlib.deploy.runner import Runner

def now_mb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split()[0]: int(line.split()[1]) for line in lines}
    return {name: kib[f"{name}:"] * 1024 / 1e6 for name in ("Rss", "Pss")}

imported = now_mb()
runner = Runner(sys.argv[1], mode=sys.argv[2])
loaded = now_mb()
foreign = sorted({"torch", "timm", "optuna", "matplotlib", "pandas"} & set(sys.modules))
print(json.dumps({
    "import_mb": imported["Rss"], "rss_mb": loaded["Rss"], "pss_mb": loaded["Pss"],
    "shared_pct": runner.shared_pct, "points": len(runner.subnets), "foreign": foreign,
}))
"""


def bundle_memory(folder: str | Path, mode: str) -> dict:
    """Resident memory (MB) of a fresh process, once it has imported the runner and once all points
    of a bundle are loaded and have answered one frame."""
    run = [sys.executable, "-P", "-c", _LOAD, str(folder), mode]
    return {"mode": mode, **json.loads(subprocess.check_output(run, text=True))}


def bundle_latency(
    folder: str | Path, graphs: Mapping[str, bytes], frame: np.ndarray, rounds: int
) -> pd.DataFrame:
    """CPU time of a frame in a bundle over that in a plain session with the same network, a row
    per mode, sub-network and round; one thread.

    `graphs`: sub-network -> its ONNX file, folded, which its plain session is opened with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    plain = {subnet: onnxruntime.InferenceSession(g, options) for subnet, g in graphs.items()}
    rows = []
    for mode in ("packed", "shared"):
        runner = Runner(folder, mode=mode)
        for subnet, session in plain.items():
            runner.switch(subnet)
            found = paired_ratio(
                lambda runner=runner: runner(frame),
                lambda session=session: session.run(None, {"images": frame}),
                rounds, calls=3, clock=time.process_time_ns,
            )  # fmt: skip
            rows += [{"mode": mode, "subnet": subnet, "ratio": ratio} for ratio in found.ratios]
    return pd.DataFrame(rows)
