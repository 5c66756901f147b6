"""The noise of frames: the same whoever asks, and forgotten once nobody can."""

import numpy as np

from dynlib.runtime.jobs import AppRun, Job
from dynlib.workload import App, Workload, app_rng

APP = App("a", "net", deadline_ms=10.0, period_ms=10.0)


def test_the_noise_of_a_frame_is_kept_while_it_may_run_again():
    run = AppRun(APP, Workload("w", 1.0, (APP,)), None, seed=3)
    rng = app_rng(3, "a", "noise")
    all_of_them = np.concatenate([rng.standard_normal(1024) for _ in range(5)])
    run.waiting.append(Job(run, 5, 0.0, run.known))
    assert [run.draw(frame) for frame in range(3000)] == all_of_them[:3000].tolist()
    assert run.draw(5) == all_of_them[5]
    run.waiting.clear()
    assert run.draw(4100) == all_of_them[4100]
    assert len(run.noise) == 1  # the block of this frame alone
