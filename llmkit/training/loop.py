"""The one loop: resume, save if due, evaluate if due, stop if asked, step, log. Every stage is a `Task` to it.

A checkpoint is begun before the evaluation of the same step: it is written while that runs, and a run that dies in a
long evaluation, or is told to stop there, has lost nothing and evaluates again, with the same result.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from llmkit.config import Interrupted, UserError, dump, flatten
from llmkit.lineage import CARD, Lineage
from llmkit.model.saving import saved_files
from llmkit.model.weights import read_tensors
from llmkit.plan import peak_flops
from llmkit.storage import (
    Damaged,
    checkpoints_of,
    machine_errors,
    newest_good,
    replace_file,
    require_free,
    run_lock,
    set_aside,
    step_of,
    sweep,
    to_json,
    trash,
    verify,
    write_file,
)
from llmkit.training import checkpoint
from llmkit.training.checkpoint import Checkpointer, safetensors_chunks
from llmkit.training.config import FREE_KEYS, RunConfig, said
from llmkit.training.dist import connect
from llmkit.training.engine import Engine, Metrics, NonFinite, Refused, keep_freed_memory
from llmkit.training.freeze import freeze
from llmkit.training.log import RunLog, plot_curves
from llmkit.training.meter import Meter, environment
from llmkit.training.optim import tensor_bytes
from llmkit.training.parallel import is_spread
from llmkit.training.task import Context, Outcome, Stop, Task
from llmkit.training.team import Team

__all__ = ["Context", "Outcome", "Stop", "Task", "train"]

STATE, TASK = "trainer_state/state.json", "trainer_state/task.safetensors"


@dataclass
class Progress:
    """What the loop itself must remember across a restart."""

    evaluated_step: int = -1
    best: float | None = None  # eval.metric of all evaluations, for early stopping
    bad_evals: int = 0
    best_saved: float | None = None  # of evaluations at steps that have a checkpoint by the recipe
    best_saved_step: int | None = None
    tokens: float = 0.0


def train(config: RunConfig, task: Task) -> Outcome:
    """Runs a recipe from where its folder stands to its end, and says how it ended.

    Raises:
        UserError: for a mistake in the recipe or the data.
        MachineError: for a full disk and the like.
        TrainingStopped: when training stopped itself; the batch lies in `nonfinite/` or `spikes/`.
    """
    out, stop = Path(config.out), Stop()
    with stop.listening(), machine_errors(out):
        said = config.parallel
        ranks = connect(
            config.device, config.liveness.stalled_s + 60, said.tensor, config.liveness, said.context, said.experts
        )
        with ranks.watched(), contextlib.ExitStack() as held:
            # Rank 0 looks and tells: the others might look after it has written.
            looked = _look(config, out, held) if ranks.is_main else None
            refused, changed, done = ranks.from_main(looked)
            if refused:
                raise UserError(refused)
            if done and not changed:
                if ranks.is_main:
                    print(f"{out}: this run is finished: nothing to do")
                return Outcome.FINISHED
            log = RunLog(out, ranks.is_main, config.log.tensorboard)
            try:
                return _Run(config, task, Context(config, out, ranks, log, stop)).go(changed)
            finally:
                log.close()


def _look(config: RunConfig, out: Path, held: contextlib.ExitStack) -> tuple[str | None, list[str], bool]:
    """Takes the run's folder: why that is refused, what differs in the recipe, and whether the run is finished."""
    try:
        held.enter_context(run_lock(out))
    except UserError as e:
        return str(e), [], False
    return None, _changed_keys(config, out), (out / "DONE").is_file()


def _changed_keys(config: RunConfig, out: Path) -> list[str]:
    """What differs from the recipe the run was started with, one `key: old -> new` each."""
    file = out / "recipe.yaml"
    if not file.is_file():
        return []
    old, new = flatten(yaml.safe_load(file.read_text("utf-8"))), flatten(yaml.safe_load(dump(config)))
    # Which checkpoints there are decides where a rollback goes.
    bound = ("save.every",) if config.guard.action == "rollback" else ()
    free = {k for k in {**old, **new} if f"{k}.".startswith(FREE_KEYS) and k not in bound}
    differ = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in free]
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in differ]


class _Run:
    """One start of a run: the loop and what it holds."""

    def __init__(self, config: RunConfig, task: Task, ctx: Context):
        self.config, self.task, self.ctx = config, task, ctx
        self.log, self.ranks, self.out = ctx.log, ctx.ranks, ctx.out
        self.progress = Progress()
        self.saver = Checkpointer(self.out, config.save.keep, config.save.asynchronous, self.log.sync)
        self.saved_step = -1
        self.lineage: Lineage | None = None  # rank 0's

    def go(self, changed: list[str]) -> Outcome:
        if self.config.precision == "fp16" and self.ranks.device.type != "cuda":
            raise UserError(f"precision: fp16 is for CUDA (got {self.ranks.device.type}): use bf16 or fp32")
        self._check_recipe(changed)
        keep_freed_memory()
        interrupted = False
        try:
            self.ranks.main_first("prepare", lambda: self.task.prepare(self.ctx), Interrupted)
        except Interrupted:
            interrupted = True
        if self.ranks.any(interrupted):
            self._mark("PREEMPTED")
            self.log.say(f"stopped by {self._signal} while the data was being prepared: start again to go on")
            return Outcome.PREEMPTED
        module = self.task.build(self.ctx)
        told = freeze(module, self.config.freeze)
        if told is not None:
            self.log.say(told)
        if self.config.compile and not is_spread(self.config.parallel, self.ranks):
            module.compile()
        self.engine = Engine(module, self.config, self.ranks, self.task.parts)
        self._resume()
        if self.engine.split is not None:
            self.saver.team = Team(self.ranks)
        if self.ranks.is_main:
            require_free(self.out, self._state_bytes() + (1 << 20))
        try:
            outcome = self._loop()
            self.saver.wait()
        except BaseException as e:
            with contextlib.suppress(Exception):  # the error on its way is the one to show
                self.saver.give_up()
                self.saver.wait()
            if isinstance(e, Refused):
                self._dump(e)
            raise
        return self._finish(outcome)

    # --- before the first step -------------------------------------------------------------------------------------

    def _check_recipe(self, changed: list[str]) -> None:
        started = bool(checkpoints_of(self.out))
        if changed and started and not self.config.allow_changes:
            raise UserError(
                "\n".join(
                    [
                        f"{self.out}: the run was started with another recipe:",
                        *(f"  {c}" for c in changed),
                        "put it back, choose another `out`, or allow it with allow_changes=true",
                    ]
                )
            )
        if not self.ranks.is_main:
            return
        for line in changed if started else ():
            self.log.say(f"recipe changed: {line}")
        sweep(self.out)
        for name in ("DONE", "PREEMPTED"):
            (self.out / name).unlink(missing_ok=True)
        replace_file(self.out / "recipe.yaml", dump(self.config))
        self.lineage = Lineage.note(self.out, flatten(json.loads(self.config.model_dump_json())), started)
        different = self._note_environment()
        for line in different if started else ():
            self.log.say(f"warning: environment changed: {line}: the last bits of results may differ")

    def _note_environment(self) -> list[str]:
        """Keeps what the run is computed with; returns what is not as it was at the last start."""
        file, now = self.out / "environment.json", environment(self.ranks)
        before = {}
        with contextlib.suppress(OSError, ValueError):
            before = flatten(json.loads(file.read_bytes()))
        replace_file(file, to_json(now))
        told = flatten(now)
        keys = [k for k in before if k != "world_size" and before[k] != told.get(k)]  # _resume tells of another world
        return [f"{k}: {before[k]} -> {told.get(k)}" for k in keys]

    def _resume(self) -> None:
        good, passed_over = newest_good(self.out) if self.ranks.is_main else (None, {})
        for sentence in passed_over.values():
            self.log.say(f"warning: {sentence}")
        name, none_holds = self.ranks.from_main((good and good.name, bool(passed_over) and good is None))
        if name is None:
            if none_holds:
                raise UserError(f"{self.out}: no checkpoint of this run holds: choose another `out` to start anew")
            self.log.cut({})
            return
        for damaged in passed_over:
            self.log.say(f"{damaged} is now {set_aside(damaged).name}")
        folder = self.out / "checkpoints" / name
        state = self._load(folder)
        self.log.say(f"resumed from {folder}")
        if state["world"] != self.ranks.processes:
            self.log.say(
                f"started on {state['world']} ranks, now {self.ranks.processes}: the same samples in the same order, "
                "equal up to the rounding of sums"
            )

    def _load(self, folder: Path) -> dict[str, Any]:
        """Puts everything back to where a checkpoint stands, the logs too; returns its state.json."""
        try:
            if self.engine.split is None:
                tensors, state = checkpoint.load(folder)
                own = tensors.pop(TASK, {})
                self.engine.load(tensors, state["engine"])
            else:
                state = json.loads((folder / STATE).read_bytes())
                own = dict(read_tensors(folder / TASK)) if (folder / TASK).is_file() else {}
                self.engine.load_pieces(folder, (TASK,), state["engine"])
        except ValueError as e:
            raise UserError(f"{folder}: does not fit this recipe: {e}") from None
        self.task.load_state_dict(state["task"], own)
        self.progress = Progress(**state["progress"])
        self.log.cut(state["log"])
        self.saved_step = self.engine.step
        return state

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> Outcome:
        if self.ranks.is_main and self.engine.split is None:
            self.saver.reserve(self.engine.tensors())
        peak = peak_flops(self.ranks.device, self.config.precision)
        meter = Meter(self.config, self.log, self.ranks.processes, self.task.flops_per_token, peak)
        self.log.start_bar(self.engine.step, self.config.steps)
        with contextlib.ExitStack() as profiling:
            while True:
                try:
                    outcome = self._advance(meter, profiling)
                except Refused as e:
                    self._roll_back(e)
                    continue
                if outcome is not None:
                    return outcome

    def _advance(self, meter: Meter, profiling: contextlib.ExitStack) -> Outcome | None:
        """What is due before the next step, and that step; how the run ended if it did."""
        config, engine = self.config, self.engine
        if self._save_due():
            self._save()
        evaluated = self._evaluate_if_due()
        stopping = not evaluated or self.ctx.all_should_stop()
        finished = engine.step >= config.steps or self._plateau()
        paused = engine.step >= config.last_step
        if finished or paused or stopping:
            self._save()
        if self.engine.split is None:
            self.saver.poll()
        elif self.ranks.any(self.saver.failed):  # all have lost the checkpoint, and stop at the same step
            self.saver.wait()
        if finished and evaluated:
            return Outcome.FINISHED
        if stopping:
            return Outcome.PREEMPTED
        if paused:
            return Outcome.PAUSED
        self._profile(profiling)
        self.ranks.at(engine.step + 1)
        started = time.perf_counter()
        try:
            metrics = self.task.step(engine, self.ctx)
        except Interrupted:
            self._save()
            return Outcome.PREEMPTED
        for failure in engine.refused:
            self._dump(failure)
            self.log.say(f"step {failure.step} was left out")
        record: dict[str, Any] = {"step": engine.step, **{f"train/{k}": v for k, v in metrics.items()}}
        if engine.refused:
            record = {k: v for k, v in record.items() if math.isfinite(v)}
            record["guard"] = engine.guard and engine.guard.events[-1]
            engine.refused = []
        else:
            self.progress.tokens += metrics["tokens"]
        self.log.metrics({**record, **engine.watched})
        meter.step(engine.step, metrics, time.perf_counter() - started)
        return None

    def _roll_back(self, failure: Refused) -> None:
        """Goes back to a checkpoint and leaves out the data from there to the failure; raises the failure if it must.

        All that decides is saved or a function of the recipe. A run that is killed before it has saved again comes to
        the same failure once more, and does the same.
        """
        engine, guard = self.engine, self.engine.guard
        if guard is None or guard.config.action != "rollback" or not guard.target(engine.step):
            raise failure
        guard.check_budget(failure)
        self.saver.wait()
        window = engine.data_step + 1 + guard.config.beyond
        name = self.ranks.from_main(self._way_back(guard.target(engine.step)) if self.ranks.is_main else None)
        if name is None:
            raise failure
        self._dump(failure)
        if self.ranks.is_main:
            for folder in checkpoints_of(self.out):
                if folder.name > name:
                    trash(folder)  # they are of a course that is given up; newest first, so that what is left is whole
        refused = guard.state()
        state = self._load(self.out / "checkpoints" / name)
        first, known = engine.data_step, state["engine"]["guard"]
        guard.remember(refused)
        guard.refuse(
            {
                "step": failure.step,
                "action": "rollback",
                "why": str(failure),
                "to": engine.step,
                "data": [first, window],
            }
        )
        engine.windows_skipped = window - engine.step
        for event in guard.events[len(known["events"]) if known else 0 :]:  # what was in the log of them was cut off
            self.log.metrics({"step": engine.step, "guard": event})
        self.log.say(f"back to step {engine.step}, without the data of {window - first} steps")
        self.log.rewind(engine.step)

    def _way_back(self, target: int) -> str | None:
        """The good checkpoint of the target step; if it is damaged, the newest before it that the recipe asked for."""
        every = self.config.save_every or 1
        for folder in checkpoints_of(self.out):
            if step_of(folder) <= target and step_of(folder) % every == 0:
                try:
                    verify(folder)
                    return folder.name
                except Damaged as e:
                    self.log.say(f"warning: {folder} was passed over: {e}")
        return None

    def _evaluate_if_due(self) -> bool:
        """Evaluates where the recipe says so. False if a signal cut it short: it is then done again on resume."""
        step, every = self.engine.step, self.config.eval.every
        due = every is not None and (step % every == 0 or step == self.config.steps)
        if not due or self.progress.evaluated_step == step:
            return True
        metrics = self.task.evaluate(self.engine, self.ctx, "valid")
        if metrics is None:
            return False
        self.progress.evaluated_step = step
        if not metrics:
            return True
        self._record_evaluation(metrics)
        config, progress = self.config.eval, self.progress
        if config.metric not in metrics:
            raise UserError(f"eval.metric: '{config.metric}' is not evaluated: choose one of {', '.join(metrics)}")
        sign = 1.0 if config.better == "lower" else -1.0
        now = metrics[config.metric]
        if self._save_due() and (progress.best_saved is None or sign * now < sign * progress.best_saved):
            progress.best_saved, progress.best_saved_step = now, step
        if progress.best is None or sign * now < sign * progress.best - config.min_delta:
            progress.best, progress.bad_evals = now, 0
        else:
            progress.bad_evals += 1
        return True

    def _record_evaluation(self, metrics: Metrics) -> None:
        if not all(math.isfinite(v) for v in metrics.values()):
            raise NonFinite(self.engine.step, metrics, [])
        self.log.metrics({"step": self.engine.step, **metrics})
        self.log.say(f"step {self.engine.step:6d} | " + " | ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def _plateau(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.progress.bad_evals >= patience

    def _save_due(self) -> bool:
        """Whether the recipe asks for a checkpoint here: a function of the step alone, not of the run's history."""
        step, every = self.engine.step, self.config.save_every
        return step == self.config.steps or (every is not None and step % every == 0 and step > 0)

    def _save(self) -> None:
        """Begins a checkpoint of this step, unless there is one or no step was made."""
        step, progress = self.engine.step, self.progress
        if step in (0, self.saved_step):
            return
        started = time.perf_counter()
        tensors, guard = self.engine.tensors(), self.engine.guard
        spread = self.engine.split is not None
        if (own := self.task.tensors()) and (self.ranks.is_main or not spread):
            tensors[TASK] = {name: t.clone() for name, t in own.items()} if spread else own
        bad = checkpoint.non_finite(tensors)
        if bad or (spread and self.ranks.any(bool(bad))):
            raise NonFinite(step, {"weights": math.nan}, bad)
        self.saved_step = step
        if guard is not None and self._save_due():
            guard.note_save(step)
        if not self.ranks.is_main:
            if spread:
                self.saver.save(step, tensors, {}, {})
            return
        state = {
            "engine": self.engine.state(),
            "task": self.task.state_dict(),
            "progress": asdict(progress),
            "log": self.log.lengths(),
            "world": self.ranks.processes,
        }
        blobs = {**saved_files(self.task.files(self.engine), self.engine.module), STATE: to_json(state).encode()}
        facts = {
            "world_size": self.ranks.processes,
            "run": self.out.name,
            "recipe": flatten(json.loads(self.config.model_dump_json())),
        }
        if guard is not None:
            facts["refused"] = guard.events
        assert self.lineage is not None
        facts |= self.lineage.facts()
        for name in [name for name in blobs if Path(name).name == CARD]:
            blobs[name] += self.lineage.card(said(self.config))
        self.saver.wait()  # what is needed is a question to the disk
        if spread:
            blobs |= self.engine.wholes.index_files()
        size = self.engine.wholes.total_bytes if spread else 0
        self.saver.save(step, tensors, blobs, {**facts, **self.task.facts()}, self._needed(), n_bytes=size)
        self.log.timing({"step": step, "save_blocked_s": round(time.perf_counter() - started, 4)})

    def _state_bytes(self) -> int:
        """What a checkpoint's tensors take on disk."""
        if self.engine.split is not None:
            return self.engine.wholes.total_bytes
        return sum(tensor_bytes(t.values()) for t in self.engine.tensors().values())

    def _needed(self) -> set[int]:
        """The steps whose checkpoints stay whatever their age: the best, and what a rollback may go to."""
        keep_best, best = self.config.save.keep_best, {self.progress.best_saved_step}
        needed = set()
        if self.engine.guard is not None and self.config.guard.action == "rollback":
            for folder in checkpoints_of(self.out):
                if step_of(folder) >= self.engine.guard.floor and step_of(folder) % (self.config.save_every or 1) == 0:
                    needed.add(step_of(folder))
                    with contextlib.suppress(OSError, ValueError):  # a damaged one has no best
                        best.add(json.loads((folder / STATE).read_bytes())["progress"]["best_saved_step"])
        return needed | {step for step in best if keep_best and step is not None}

    def _profile(self, stack: contextlib.ExitStack) -> None:
        steps = self.config.log.profile_steps
        if steps is None or not self.ranks.is_main:
            return
        if self.engine.step == steps[0]:
            folder = self.out / "profile"
            folder.mkdir(exist_ok=True)

            def export(profile: Any) -> None:
                profile.export_chrome_trace(str(folder / f"steps-{steps[0]}-{steps[1]}.json"))
                table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
                (folder / "table.txt").write_text(table, "utf-8")

            stack.enter_context(torch.profiler.profile(record_shapes=True, on_trace_ready=export))
        elif self.engine.step == steps[1]:
            stack.close()

    # --- the end ---------------------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> Outcome:
        step = self.engine.step
        if outcome is Outcome.FINISHED:
            metrics = self.task.evaluate(self.engine, self.ctx, "test")
            if metrics is None:
                outcome = Outcome.PREEMPTED  # the final checkpoint stands; the test is scored on the next start
            elif metrics:
                self._record_evaluation(metrics)
        if outcome is Outcome.PREEMPTED:
            self._mark("PREEMPTED")
            where = f"at step {step}, saved" if step else "before the first step"
            self.log.say(f"stopped by {self._signal} {where}: start again to go on")
        elif outcome is Outcome.PAUSED:
            self.log.say(f"stop_at: step {step} of {self.config.steps}, saved")
        elif self.ranks.is_main:
            if self._plateau():
                bad, metric = self.progress.bad_evals, self.config.eval.metric
                self.log.say(f"no better {metric} in {bad} evaluations: stopped at step {step}")
            self.log.sync()
            self._mark("DONE", {"step": step, "metric": self.config.eval.metric, "best": self.progress.best})
        if self.ranks.is_main and self.config.log.plot and outcome is not Outcome.PREEMPTED:
            plot_curves(self.out, self.out.name)
        return outcome

    @property
    def _signal(self) -> str:
        return self.ctx.stop.signal or "a signal to another rank"

    def _mark(self, name: str, content: dict[str, Any] | None = None) -> None:
        if self.ranks.is_main:
            replace_file(self.out / name, to_json(content or {}))

    def _dump(self, error: Refused) -> None:
        """Keeps the batch that did it, each rank its own part."""
        folder = self.out / error.folder
        folder.mkdir(exist_ok=True)
        stem = f"step-{error.step:08d}-rank{self.ranks.process}"
        tensors = {
            f"{i}.{name}": t.detach().cpu()
            for i, batch in enumerate(error.batches)
            for name, t in vars(batch).items()
            if isinstance(t, Tensor)
        }
        write_file(folder / f"{stem}.safetensors", safetensors_chunks(tensors))
        told = {
            "step": error.step,
            "why": str(error),
            "metrics": {k: str(v) for k, v in error.metrics.items()},
            "tensors": error.tensors,
        }
        write_file(folder / f"{stem}.json", [to_json(told).encode()])
        self.log.say(f"{error}; the batch is kept in {folder}")
