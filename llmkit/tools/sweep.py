"""`llmkit sweep`: trains a recipe again and again with other values, and says which were best.

Every trial is a run of its own below the sweep's folder, trained by `llmkit train` in a process of its own. Optuna says what
is tried next and which trials aren't worth their end; what is known of the trials is kept in `sweep.json`, replaced whole
after each change, so that the same command goes on wherever it was stopped. What a trial tries is a function of the seed,
its number and the results before it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit.config import UserError, flatten
from llmkit.stages import load_recipe
from llmkit.storage import checkpoints_of, machine_errors, replace_file, run_lock, to_json, trash
from llmkit.tools.comparison import markdown
from llmkit.tools.sweep_values import Values, parse_over
from llmkit.training.log import read_lines

FILE, FORMAT = "sweep.json", 1
STARTUP = 8  # trials at random, before what they found says where to look
PREEMPTED, STOPPED_ITSELF, USER_MISTAKE = 75, 3, 2
TRAIN = (sys.executable, "-m", "llmkit.cli", "train")
_POLL_S = 0.25

Record = dict[str, Any]
Curve = list[tuple[int, float]]


def run(args: argparse.Namespace) -> int:
    """A line a trial on stdout, at the end the table; sweep.md, sweep.png and sweep.json in the folder."""
    sweep = _read(args)
    with machine_errors(sweep.out), run_lock(sweep.out):
        sweep.open()
        done = sum(trial["state"] != "running" for trial in sweep.trials)
        print(f"{sweep.out}: {args.trials} trials of {', '.join(sweep.over)}; {done} are done", flush=True)
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError("sweep: optuna is not installed: pip install 'llmkit[sweep]'") from None
        from llmkit.training.task import Stop  # here, since it brings torch, and the first line must not wait for that

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        stop = Stop()
        with stop.listening():
            while (number := sweep.next_number(args.trials)) is not None:
                if not sweep.trial(number, optuna, stop):
                    print(f"stopped by {stop.signal or 'a signal'}: start again to go on", flush=True)
                    return PREEMPTED
        _write(sweep)
    return 0


@dataclass
class Sweep:
    """A sweep and what is known of its trials."""

    recipe: str
    overrides: list[str]
    out: Path
    over: dict[str, Values]
    metric: str
    better: str
    prune_after: int | None
    """Trials that must be done before others are ended early; None: none is."""
    seed: int
    keep_all: bool
    resolved: Record
    """The recipe without what is varied."""

    # --- what is kept ---

    @property
    def settings(self) -> Record:
        """What the trials depend on."""
        over = {key: asdict(values) for key, values in self.over.items()}
        kept = {"recipe": self.resolved, "over": over, "metric": self.metric, "better": self.better, "seed": self.seed}
        return {**kept, "prune_after": self.prune_after}

    def open(self) -> None:
        """Reads what is kept. Raises UserError for a folder of another sweep, naming what differs."""
        self.trials: list[Record] = []
        file = self.out / FILE
        if not file.is_file():
            return
        kept = _kept(file)
        old, new = flatten(kept["settings"]), flatten(_plain(self.settings))
        differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differ:
            told = "".join(f"\n  {key}: {old.get(key)} -> {new.get(key)}" for key in differ)
            raise UserError(f"{file}: was begun with other settings:{told}\nput them back, or choose another --out")
        self.trials = kept["trials"]

    def note(self, number: int, **facts: Any) -> None:
        """Adds to what is known of a trial, on disk when this returns."""
        self.trials[number - 1] |= facts
        told = {"format": FORMAT, "settings": _plain(self.settings), "trials": self.trials}
        replace_file(self.out / FILE, to_json(told))

    def next_number(self, trials: int) -> int | None:
        """The trial that was begun and not ended, or else the next, counted from 1; None when there are enough."""
        for trial in self.trials:
            if trial["state"] == "running":
                return int(trial["number"])
        return len(self.trials) + 1 if len(self.trials) < trials else None

    def folder(self, number: int) -> Path:
        return self.out / "trials" / f"{number:04d}"

    @property
    def best(self) -> Record | None:
        done = [trial for trial in self.trials if trial["state"] == "complete"]
        sign = 1 if self.better == "lower" else -1
        return min(done, key=lambda trial: sign * trial["value"], default=None)

    # --- one trial ---

    def trial(self, number: int, optuna: Any, stop: Any) -> bool:
        """Trains one trial to its end; False if a signal came, after which it is still to be ended."""
        study = self._study(number, optuna)
        if number > len(self.trials):
            asked = study.ask({key: values.distribution(optuna) for key, values in self.over.items()})
            values = {key: values.rounded(asked.params[key]) for key, values in self.over.items()}
            self.trials.append({"number": number, "values": values, "state": "running"})
            self.note(number)
        else:
            study.enqueue_trial(self.trials[number - 1]["values"])
            asked = study.ask({key: values.distribution(optuna) for key, values in self.over.items()})
        texts = [f"{key}={_text(value)}" for key, value in self.trials[number - 1]["values"].items()]
        code, said, pruned = self._train(number, texts, asked, stop)
        if pruned and code in (PREEMPTED, -signal.SIGTERM):  # the latter, where it had not yet begun to listen
            self.note(number, state="pruned", **self._found(number))
        elif code == 0:
            self._complete(number)
        elif stop or code == PREEMPTED:
            return False
        elif code == STOPPED_ITSELF:
            self.note(number, state="failed", why=said, **self._found(number))
        elif code == USER_MISTAKE and any(t["state"] == "complete" for t in self.trials):
            self.note(number, state="refused", why=said, value=None, curve=[])
        else:
            how = f"{said}\n" if said else ""
            raise UserError(f"{how}trial {number} ({' '.join(texts)}) could not be trained: exit code {code}")
        self._tell(number, texts)
        self._tidy()
        return True

    def _study(self, number: int, optuna: Any) -> Any:
        """What Optuna is to know before a trial: the others, and no more."""
        seed = random.Random(f"{self.seed}/{number}").getrandbits(32)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        pruner = optuna.pruners.NopPruner()
        if self.prune_after is not None:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=self.prune_after)
        direction = "minimize" if self.better == "lower" else "maximize"
        study = optuna.create_study(sampler=sampler, pruner=pruner, direction=direction)
        distributions = {key: values.distribution(optuna) for key, values in self.over.items()}
        for trial in self.trials[: number - 1]:
            state = optuna.trial.TrialState.COMPLETE if trial["state"] == "complete" else optuna.trial.TrialState.PRUNED
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial["values"],
                    distributions=distributions,
                    state=state,
                    value=trial["value"],
                    intermediate_values=dict(trial["curve"]),
                )
            )
        return study

    def _train(self, number: int, values: Sequence[str], asked: Any, stop: Any) -> tuple[int, str, bool]:
        """Exit code, what was said last on stderr, and whether it was ended as not worth its end."""
        out = self.folder(number)
        out.mkdir(parents=True, exist_ok=True)
        argv = [*TRAIN, self.recipe, *self.overrides, *values, f"out={out}"]
        told, signalled, pruned = 0, False, False
        with (out.parent / f"{out.name}.log").open("w+b") as log:
            child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log, stdin=subprocess.DEVNULL)
            try:
                while child.poll() is None:
                    if stop and not signalled:
                        child.terminate()
                        signalled = True
                    curve = self._curve(number)
                    for step, value in curve[told:]:
                        asked.report(value, step)
                        if not signalled and self.prune_after is not None and asked.should_prune():
                            child.terminate()
                            signalled = pruned = True
                    told = len(curve)
                    time.sleep(_POLL_S)
            except BaseException:
                child.terminate()
                child.wait()
                raise
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().splitlines()
        return child.returncode, said[-1].removeprefix("error: ") if said else "", pruned and not stop

    def _curve(self, number: int) -> Curve:
        """The metric at the evaluations so far, but for the one before the first step, which is the same for all."""
        lines = read_lines(self.folder(number) / "metrics.jsonl")
        found = [
            (r["step"], r[self.metric]) for r in lines if r["step"] > 0 and isinstance(r.get(self.metric), int | float)
        ]
        return [(step, float(value)) for step, value in found if math.isfinite(value)]

    def _found(self, number: int) -> Record:
        curve = self._curve(number)
        return {"value": curve[-1][1] if curve else None, "curve": curve}

    def _complete(self, number: int) -> None:
        found = self._found(number)
        if found["value"] is None:
            lines = read_lines(self.folder(number) / "metrics.jsonl")
            names = sorted({key for line in lines for key in line if not key.startswith("train/")} - {"step"})
            raise UserError(
                f"sweep: --metric {self.metric}: no evaluation tells it: it is one of {', '.join(names) or '-'}"
            )
        self.note(number, state="complete", **found)

    def _tell(self, number: int, values: Sequence[str]) -> None:
        trial, best = self.trials[number - 1], self.best
        value = "-" if trial["value"] is None else f"{trial['value']:.5g}"
        so_far = "" if best is None else f" (best {best['value']:.5g}, trial {best['number']})"
        print(f"trial {number}: {' '.join(values)}: {trial['state']}, {self.metric} {value}{so_far}", flush=True)

    def _tidy(self) -> None:
        """Only the best trial keeps its checkpoints: those of many would fill a disk."""
        best = self.best
        for trial in self.trials:
            if not self.keep_all and trial["state"] != "running" and trial is not best:
                for folder in checkpoints_of(self.folder(trial["number"])):
                    trash(folder)


# --- the command line ------------------------------------------------------------------------------------------------


def _read(args: argparse.Namespace) -> Sweep:
    """The options, checked against the recipe before anything is trained."""
    over = dict(parse_over(text) for text in args.over)
    if len(over) < len(args.over):
        raise UserError("sweep: --over: a key stands twice")
    if args.trials < 1:
        raise UserError(f"sweep: --trials must be at least 1 (got {args.trials})")
    if args.prune_after is not None and args.prune_after < 1:
        raise UserError(f"sweep: --prune-after must be at least 1 (got {args.prune_after})")
    for values in zip(*(v.ends() for v in over.values()), strict=True):  # both ends of every range must be a recipe
        texts = [f"{key}={_text(value)}" for key, value in zip(over, values, strict=True)]
        recipe = load_recipe(args.recipe, [*args.overrides, *texts])
    told = recipe.model_dump(mode="json")
    evaluation = told.get("eval")
    if evaluation is None:
        raise UserError(
            f"sweep: stage {told['stage']} is not evaluated while it is trained: there is nothing to search by"
        )
    metric, better = args.metric or evaluation["metric"], args.better
    if better is None:
        if metric != evaluation["metric"]:
            raise UserError(f"sweep: --metric {metric}: say with --better whether lower or higher is better")
        better = evaluation["better"]
    resolved = {key: value for key, value in flatten(told).items() if key != "out" and key not in over}
    out = Path(args.out) if args.out is not None else Path(f"{told['out']}-sweep")
    prune_after = None if args.no_pruning else args.prune_after or 4
    return Sweep(
        args.recipe, args.overrides, out, over, metric, better, prune_after, args.seed, args.keep_all, resolved
    )


def _text(value: Any) -> str:
    """A value as an override has it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(settings: Record) -> Record:
    """As it comes back from JSON."""
    told: Record = json.loads(json.dumps(settings))
    return told


def _kept(file: Path) -> Record:
    """A sweep's file. Raises UserError for one that is none."""
    try:
        kept: Record = json.loads(file.read_bytes())
        if kept["format"] != FORMAT:
            raise UserError(f"{file}: format {kept['format']!r}: this version reads {FORMAT}")
        return kept
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is no sweep's file: move it away, or choose another --out") from None


# --- what came of it -------------------------------------------------------------------------------------------------


def _write(sweep: Sweep) -> None:
    """sweep.md and sweep.png; the table is printed too."""
    text = markdown(list(_rows(sweep)), list(_remarks(sweep)))
    replace_file(sweep.out / "sweep.md", text)
    print(text, end="")
    if not _draw(sweep, sweep.out / "sweep.png"):
        note = "note: no picture is drawn: matplotlib is not installed (pip install 'llmkit[log]')"
        print(note, file=sys.stderr)


def _rows(sweep: Sweep) -> Iterator[list[str]]:
    """The best first, then those that weren't brought to their end."""
    yield ["trial", *sweep.over, sweep.metric, "step", "state"]
    sign = 1 if sweep.better == "lower" else -1
    for trial in sorted(
        sweep.trials, key=lambda t: (t["state"] != "complete", math.inf if t["value"] is None else sign * t["value"])
    ):
        value = "-" if trial["value"] is None else f"{trial['value']:.5g}"
        step = str(trial["curve"][-1][0]) if trial["curve"] else "-"
        yield [str(trial["number"]), *(_text(v) for v in trial["values"].values()), value, step, trial["state"]]


def _remarks(sweep: Sweep) -> Iterator[str]:
    best = sweep.best
    if best is not None:
        values = " ".join(f"{key}={_text(value)}" for key, value in best["values"].items())
        yield f"best: trial {best['number']}, {sweep.folder(best['number'])}: {values}"
        for key, values_ in sweep.over.items():
            if values_.is_at_an_end(best["values"][key]):
                yield f"{key}: the best value is at the end of its range: a wider one may hold a better"
    if sweep.prune_after is not None:
        yield f"pruned: ended early, worse at a step than the median of the trials before it ({sweep.prune_after} at least)"
    for trial in sweep.trials:
        if trial.get("why"):
            yield f"trial {trial['number']} {trial['state']}: {trial['why']}"


def _draw(sweep: Sweep, path: Path) -> bool:
    """The metric against each of the values, and the curves of all trials; False where Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [trial for trial in sweep.trials if trial["value"] is not None]
    figure, axes = plt.subplots(
        1, len(sweep.over) + 1, figsize=(4 * (len(sweep.over) + 1), 3.4), dpi=110, squeeze=False
    )
    for ax, (key, values) in zip(axes[0], sweep.over.items(), strict=False):
        for state, face in (("complete", "tab:blue"), ("pruned", "none"), ("failed", "none")):
            some = [t for t in shown if t["state"] == state]
            points = [values.place(t["values"][key]) for t in some], [t["value"] for t in some]
            ax.scatter(*points, facecolors=face, edgecolors="tab:red" if state == "failed" else "tab:blue", label=state)
        values.label(ax)
        ax.set(xlabel=key, ylabel=sweep.metric)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for trial in shown:
        is_best = trial is sweep.best
        colour = "tab:blue" if is_best else "0.7"
        axes[0][-1].plot(
            *zip(*trial["curve"], strict=True), color=colour, lw=2 if is_best else 0.8, zorder=2 + is_best, marker="."
        )
    axes[0][-1].set(xlabel="step", ylabel=sweep.metric, title="the best in blue")
    axes[0][-1].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True
