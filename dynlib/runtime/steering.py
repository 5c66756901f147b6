"""What is asked of a run while it goes on, by any thread: frames, requirements, apps, its end."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from dynlib.errors import PolicyError, WorkloadError, near
from dynlib.manager.policy import Policy
from dynlib.points import PointTable
from dynlib.runtime.jobs import AppRun
from dynlib.workload import App, Change, requirement_at

MAX_PUSHED = 100  # frames of an app that wait; of more, those that have waited longest are dropped


class Steered:
    """The part of a `Loop` that others call while it runs.

    What is wanted goes into the loop's inbox and wakes it up (`post`); it is done in the loop's own
    thread, as one more event. Then `workload` and `tables` say what was asked for in all, and the
    log has every change as a `set`.
    """

    def post(self, do: Callable[[], Any], answer: Future | None = None) -> None:
        """Have the loop do something as soon as it can; `answer` is cancelled if it ends before."""
        self.inbox.append((self.clock_ms(), do, answer))
        self.bell.set()
        if self.ended and answer is not None:
            answer.cancel()

    def submit(self, app: str, frame: Any) -> Future:
        """A frame of an app comes now; what answers it is given `frame`.

        The result is its answer, late or not; cancelled if it was dropped, and with the exception
        that the app died of. Raises `WorkloadError` for an unknown app.
        """
        self._known_app(app)
        answer: Future = Future()
        self.post(lambda: self._submitted(app, frame, answer), answer)
        return answer

    def set_requirement(
        self,
        app: str,
        *,
        deadline_ms: float | None = None,
        period_ms: float | None = None,
        accuracy_floor_pct: float | None = None,
    ) -> None:
        """From now on an app asks for this; what is left out stays as it is.

        Raises `WorkloadError` for an unknown app and for values that make no sense.
        """
        self._known_app(app)
        change = Change(
            self.clock_ms() / 1000,
            app,
            deadline_ms=deadline_ms,
            period_ms=period_ms,
            accuracy_floor_pct=accuracy_floor_pct,
        )
        self.post(lambda: self._require(change))

    def add_app(
        self, app: App, table: PointTable | None = None, policy: Policy | None = None
    ) -> None:
        """An app joins, now or at its `start_s` if that is later.

        Args:
            table: the points of its model, where that is a new one.
            policy: goes on in place of the present one, with its memory, where only this one knows
                the model.

        Raises `WorkloadError` for an app of the same name, `PolicyError` for a model without table.
        """
        if app.name in self.names:
            raise WorkloadError(f"app {app.name!r} is there already; expected another name")
        if table is None:
            self._known_model(app)
        self.names.add(app.name)
        self.post(lambda: self._join(app, table, policy))

    def remove_app(self, name: str) -> None:
        """An app leaves: what waits is dropped, what runs is finished. Raises `WorkloadError` for
        an unknown one."""
        self._known_app(name)
        self.names.discard(name)
        self.post(lambda: self._leave(name))

    def stop(self) -> None:
        """End the run: what waits is dropped, what runs is finished."""
        self.post(self._stop)

    def _known_app(self, name: str) -> None:
        if name not in self.names:
            raise WorkloadError(f"no app {name!r}; {near(name, self.names)}")

    def _known_model(self, app: App) -> None:
        if app.model not in self.tables:
            raise PolicyError(
                f"app {app.name!r}: no table for model {app.model!r}; "
                f"there are {sorted(self.tables)}"
            )

    def _submitted(self, name: str, frame: Any, answer: Future) -> None:
        run = self.apps[name]
        need = requirement_at(run.steps, self.now_ms)
        if run.left or self.stopped or not self.workload.fits(self.now_ms, need):
            answer.cancel()
            return
        job = self._arrive(run, need)
        job.content, job.answer = frame, answer
        if len(run.waiting) > MAX_PUSHED:
            self.drop(run.waiting[0], "queue full")

    def _require(self, change: Change) -> None:
        change = replace(change, t_s=self.now_ms / 1000)
        run = self.apps[change.app]
        self.workload = replace(self.workload, changes=(*self.workload.changes, change))
        run.steps[:] = self.workload.timeline(run.app)
        need = requirement_at(run.steps, self.now_ms)
        if change.period_ms is None:  # it may have been learnt
            need = need._replace(period_ms=run.known.period_ms)
        run.known, self.ask = need, True
        self._log_app(run, "requires")

    def _join(self, app: App, table: PointTable | None, policy: Policy | None) -> None:
        before = self.apps.get(app.name)
        app = replace(app, start_s=max(app.start_s, self.now_ms / 1000))
        others = [each for each in self.workload.apps if each.name != app.name]
        self.workload = replace(self.workload, apps=(*others, app))
        if table is not None:
            self.tables = {**self.tables, app.model: table}
            self.log.header["table_sha256"][app.model] = table.digest
        self.policy = policy or self.policy
        run = AppRun(app, self.workload, self.tables[app.model], self.seed)
        run.frames = before.frames if before else 0  # no two frames of an app have one number
        self.apps = {**self.apps, app.name: run}
        self.open = self.open or app.arrival == "pushed"
        self.log.header["models"][app.name] = app.model
        self._log_app(run, "joins", model=app.model)
        self._schedule_app(run)

    def _leave(self, name: str) -> None:
        run = self.apps[name]
        run.gone = run.left = self.ask = True
        for job in list(run.waiting):
            self.drop(job, "app left")
        self._log_app(run, "leaves")

    def _stop(self) -> None:
        self.stopped = True
        for run in self.apps.values():
            for job in list(run.waiting):
                self.drop(job, "stopped")

    def _log_app(self, run: AppRun, reason: str, **values: Any) -> None:
        need = run.known
        self.log.add(
            self.now_ms / 1000,
            "set",
            app=run.app.name,
            deadline_ms=need.deadline_ms,
            period_ms=need.period_ms,
            accuracy_floor_pct=need.floor_pct,
            reason=reason,
            **values,
        )
