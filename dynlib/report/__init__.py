"""What a notebook leaves behind: metrics, the manifest of its run, and figures drawn from tables.

Imports without torch.
"""

from dynlib.report.metrics import Metrics, Source, weakest
from dynlib.report.provenance import Run, repo_root, start

__all__ = ["Metrics", "Run", "Source", "repo_root", "start", "weakest"]
