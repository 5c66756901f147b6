"""JupyterLab on the repository: opens on the table of contents, keeps notebooks as they are kept.

A notebook of the suite is kept without outputs, so that running and saving it by hand changes no
file: what was seen is in the page, and what was computed in ``runs/``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlib.files import repo_root

CONTENTS = "/lab/tree/notebooks/guide.md"
SETTINGS = Path(__file__).with_name("lab_settings")  # texts are shown as pages; no news are fetched
LANGUAGE = {"name": "python"}  # a kernel adds the version of Python, for one
KEPT = ("jupyter", "tags")  # of a cell's metadata; the first says that its source is folded
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def bare(model: dict[str, Any], **_: Any) -> None:
    """Take out of a notebook of the suite what a run put into it; Jupyter's hook before it saves.

    >>> cell = {"cell_type": "code", "metadata": {}, "outputs": ["..."], "execution_count": 3}
    >>> book = {"metadata": {"dynlib": {}, "widgets": {}}, "cells": [cell]}
    >>> bare({"type": "notebook", "content": book})
    >>> cell["outputs"], cell["execution_count"], sorted(book["metadata"])
    ([], None, ['dynlib', 'kernelspec', 'language_info'])
    """
    content = model["content"]
    if model["type"] != "notebook" or "dynlib" not in content["metadata"]:
        return
    promises = content["metadata"]["dynlib"]
    content["metadata"] = {"dynlib": promises, "kernelspec": KERNEL, "language_info": LANGUAGE}
    for cell in content["cells"]:
        kept = {key: cell["metadata"].get(key) for key in KEPT}
        cell["metadata"] = {key: value for key, value in kept.items() if value}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None


def command(arguments: Sequence[str] = ()) -> list[str]:
    """JupyterLab's command line; `arguments` come last, and win."""
    return [
        f"--ServerApp.root_dir={repo_root()}",
        f"--LabApp.default_url={CONTENTS}",
        f"--LabApp.app_settings_dir={SETTINGS}",
        f"--FileContentsManager.pre_save_hook={__spec__.name}.{bare.__name__}",
        *arguments,
    ]


if __name__ == "__main__":
    from jupyterlab.labapp import main

    sys.exit(main(command(sys.argv[1:])))
