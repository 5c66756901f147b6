"""A super-network as a folder to share: its checkpoint, and a card that says what it is.

The same two files are a repository of the Hugging Face Hub. Nothing is sent or fetched unasked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import pandas as pd

from dynlib.errors import CheckpointError
from dynlib.files import atomic_write

WEIGHTS = "model.safetensors"  # what the Hub calls them
CARD = "README.md"


def write_card(folder: Path, name: str, provenance: Mapping[str, Any], table: pd.DataFrame) -> Path:
    """Write the model card: licence, how to use what `name` is, provenance, sub-networks."""
    about = hub.ModelCardData(
        license=provenance.get("license"),
        library_name="dynlib",
        pipeline_tag="image-classification",
    )
    facts = pd.Series(provenance, dtype=object).rename_axis("what").reset_index(name="value")
    card = f"""---
{about.to_yaml()}
---
# {name}

A super-network for dynlib: one set of weights that holds every sub-network of a search space.

    from dynlib import Supernet, SubnetServer

    supernet, provenance = Supernet.from_pretrained("{name}")
    server = SubnetServer(supernet, supernet.statistics)

## Data, recipe and licence

{_markdown(facts)}

## Sub-networks that are ready to serve

{_markdown(table)}
"""
    return atomic_write(folder / CARD, card)


def _markdown(table: pd.DataFrame) -> str:
    """A table as Markdown has it; pandas' own needs one package more."""
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: object) -> str:
    """A value as one cell of a table: no line break, and no bar that would end it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def find_weights(source: str | Path, revision: str | None, download: bool) -> Path:
    """The checkpoint in a folder, or in the cache of a repository, fetched there if `download`."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / WEIGHTS
        if not path.is_file():
            names = sorted(entry.name for entry in folder.iterdir())
            raise CheckpointError(f"{folder}: expected {WEIGHTS}, but it holds {names[:9]}")
        return path
    try:
        found = hub.hf_hub_download(
            str(source), WEIGHTS, revision=revision, local_files_only=not download
        )
    except (OSError, ValueError) as error:  # no network, no such repository, no name of one
        where = "that can be had" if download else "in the cache (download=True fetches one)"
        raise CheckpointError(
            f"{source}: neither a folder nor a repository of the Hugging Face Hub {where}: "
            f"{error!r:.300}"
        ) from error
    return Path(found)


def upload(folder: Path, repository: str) -> None:
    """Make a repository of the Hub, a private one if it is new, hold the two files of `folder`."""
    interface = hub.HfApi()
    interface.create_repo(repository, private=True, exist_ok=True)
    interface.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[WEIGHTS, CARD])
