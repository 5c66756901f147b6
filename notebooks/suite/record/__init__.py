"""What a notebook leaves behind: metrics, the manifest of its run, and figures drawn from tables.

Imports without torch.
"""

from dynlib.files import repo_root, sha256
from dynlib.source import Source, weakest
from suite.errors import SuiteError
from suite.lazy import lazily
from suite.record.metrics import Metrics
from suite.record.provenance import NotebookRun, machine, start, stored_in

__all__ = [
    "Metrics", "NotebookRun", "Source", "SuiteError", "machine", "repo_root", "sha256", "start",
    "stored_in", "weakest",
]  # fmt: skip

__getattr__ = lazily(__name__, {
    "statistics": [
        "geometric_ratio", "growth", "mean_interval", "same_sign_pct", "spread", "volumes",
    ],
})  # fmt: skip
