"""What other programs use of the CPUs, from the kernel's account of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.machine.control import Missing
from dynlib.machine.usage import Usage
from dynlib.sysfs import SysFs


class Kernel:
    """Two CPUs: time passes, somebody uses a share of each, and we use some of the rest."""

    def __init__(self, root):
        self.root, self.now_s, self.own_s, self.idle = root, 100.0, 5.0, [1000.0, 2000.0]
        (root / "proc").mkdir()
        self.write()

    def write(self, extra=""):
        lines = [f"cpu{i} 1 2 3 {int(idle)} 0 0 0 0 0 0" for i, idle in enumerate(self.idle)]
        text = "cpu  9 9 9 9 9 9 9 9 9 9\n" + "\n".join(lines) + "\nintr 5\n" + extra
        (self.root / "proc" / "stat").write_text(text)

    def passes(self, seconds, others=0.0, own=0.0):
        self.now_s += seconds
        self.own_s += own * seconds
        for i in range(2):  # in hundredths of a second
            self.idle[i] += 100 * seconds * (1 - others - own / 2)
        self.write()

    def usage(self, cpus=(0, 1)):
        return Usage(cpus, SysFs(self.root), lambda: self.now_s, lambda: self.own_s)


@pytest.fixture
def kernel(tmp_path):
    return Kernel(tmp_path)


def test_our_own_time_is_not_others(kernel):
    usage = kernel.usage()
    usage.others()
    kernel.passes(1.0, others=0.5, own=0.6)
    assert usage.others() == pytest.approx(0.5, abs=0.01)
    kernel.passes(1.0, own=1.0)
    assert usage.others() == pytest.approx(0.0, abs=0.01)


def test_of_less_than_a_window_nothing_is_said(kernel):
    usage = kernel.usage()
    assert isinstance(usage.others(), Missing)
    kernel.passes(0.02, others=1.0)
    assert isinstance(usage.others(), Missing)
    kernel.passes(0.04, others=1.0)
    assert usage.others() == pytest.approx(1.0, abs=0.2)


def test_only_the_last_window_counts(kernel):
    usage = kernel.usage()
    usage.others()
    kernel.passes(10.0, others=1.0)
    usage.others()
    for _ in range(3):
        kernel.passes(0.03)
        seen = usage.others()
    assert seen == pytest.approx(0.0, abs=0.2)


def test_without_an_account_there_is_none(kernel, tmp_path):
    assert "no cpu7" in kernel.usage((0, 7)).others().reason
    (tmp_path / "proc" / "stat").unlink()
    assert isinstance(kernel.usage().others(), Missing)


@given(st.text(max_size=200))
def test_whatever_the_file_holds_it_is_a_share_or_missing(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("root")
    kernel = Kernel(root)
    usage = kernel.usage()
    usage.others()
    kernel.now_s += 1.0
    (root / "proc" / "stat").write_text(text)
    seen = usage.others()
    assert isinstance(seen, Missing) or 0 <= seen <= 1
