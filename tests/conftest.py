import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from hypothesis import settings

matplotlib.use("agg")
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A scratch folder in memory, as sysfs is: a busy disk makes truncating files slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def root(memory) -> Path:
    """The fake tree of a Jetson."""
    import fake_tree

    from suite.studies.judge_machine import write_tree

    return write_tree(memory / "root", fake_tree.jetson())


@pytest.fixture
def lonely() -> Iterator[None]:
    """A group of one process in this one."""
    import torch

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; without one the tests that need it skip and say so."""
    given = os.environ.get("DYNLIB_DATA")
    if not given:
        pytest.skip("DYNLIB_DATA is not set: no real data")
    root = Path(given)
    assert root.is_dir(), f"DYNLIB_DATA={given} is no folder"
    return root
