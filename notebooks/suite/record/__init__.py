"""What a notebook leaves behind: metrics, the manifest of its run, and figures drawn from tables.

Imports without torch.
"""

from dynlib.files import repo_root
from dynlib.source import Source, weakest
from suite.record.metrics import Metrics
from suite.record.provenance import NotebookRun, start

__all__ = ["Metrics", "NotebookRun", "Source", "repo_root", "start", "weakest"]
