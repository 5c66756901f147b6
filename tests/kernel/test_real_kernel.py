"""The table of cases on the fake tree and, where the packages are there, on a real kernel."""

import os
from pathlib import Path

import cases
import guest
import pandas as pd
import pytest
from fake_tree import FakeKernel

from suite.studies.judge_machine import cpu_files, write_tree


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_fake_tree_answers_as_the_kernel(tmp_path, case):
    files = cpu_files([((0,), cases.KHZ), ((1,), cases.KHZ)])
    cases.run(FakeKernel(write_tree(tmp_path, files)), case)


def test_table_is_large_and_has_no_twins():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES) >= 60


@pytest.mark.parametrize("kernel", guest.KERNELS)
def test_real_kernel(tmp_path, kernel):
    if not os.environ.get("DYNLIB_REAL_KERNEL"):
        pytest.skip("a guest takes minutes: set DYNLIB_REAL_KERNEL=1 to run it")
    assert not guest.missing(), f"no real kernel: install the Debian packages {guest.missing()}"
    beside = guest.provenance(kernel)
    outcomes, text = guest.run_guest(kernel, tmp_path)
    passed = sum(outcome == "PASSED" for outcome in outcomes.values())
    assert len(outcomes) > len(cases.CASES), text[-3000:]
    assert passed == len(outcomes), text[-6000:]
    if folder := os.environ.get("DYNLIB_KERNEL_REPORTS"):
        guest.report(outcomes, text, kernel, beside, Path(folder))


@pytest.mark.parametrize("kernel", guest.KERNELS)
def test_the_report_is_of_this_code(kernel):
    """What notebook 17 says of a real kernel was seen with these files, not with earlier ones."""
    report = pd.read_csv(guest.REPORTS / f"real_kernel-{kernel}.csv", dtype=str)
    assert set(report["machine"]) == {guest.measured_on()}, (
        f"dynlib/machine has changed since it ran on Linux {kernel}; run again: {guest.COMMAND}"
    )
    assert set(report["outcome"]) == {"PASSED"}


def test_asked_for_and_not_possible_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNLIB_REAL_KERNEL", "1")
    monkeypatch.setattr(guest.shutil, "which", lambda program: None)
    with pytest.raises(AssertionError, match="install the Debian packages qemu-system-x86"):
        test_real_kernel(tmp_path, "6.1")
