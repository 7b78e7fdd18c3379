"""`llmkit run`: a pipeline, from where it stands to its end."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence

from llmkit.config import UserError
from llmkit.pipeline.graph import Pipeline, read_pipeline
from llmkit.pipeline.runner import Action, Runner, decide, forget
from llmkit.pipeline.state import State
from llmkit.plan.gpus import Gpu, find_gpu
from llmkit.storage import disk, machine_errors, run_lock

Row = tuple[str, ...]


def run(args: argparse.Namespace) -> int:
    """Does what is needed; the exit code of the node that failed, 75 after a signal, or 0."""
    pipeline = read_pipeline(args.pipeline, args.overrides, args.parsers)
    names = list(pipeline.nodes)
    if args.until is not None:
        pipeline.find(args.until, "--until")
        names = [name for name in names if name in pipeline.before(args.until)]
    if args.from_node is not None and pipeline.find(args.from_node, "--from").name not in names:
        raise UserError(f"--from {args.from_node}: --until {args.until} does not need it: drop one of them")
    if args.gpu is not None and not args.dry_run:
        raise UserError(f"--gpu {args.gpu}: is for --dry-run, which tells times: nodes run on this machine")
    if args.dry_run:
        return _dry_run(pipeline, names, args)
    with machine_errors(pipeline.out), run_lock(pipeline.out):
        return _run(pipeline, names, args)


def _run(pipeline: Pipeline, names: Sequence[str], args: argparse.Namespace) -> int:
    state = _state_of(pipeline)
    if args.from_node is not None:
        forget(pipeline, state, args.from_node)
    runner = Runner(pipeline, state, lambda text: print(text, flush=True))
    with runner.listening():
        actions = decide(pipeline, state, names)
        code = runner.run(actions)
    if code:
        again = shlex.join(["llmkit", "run", args.pipeline, *args.overrides])  # without --from, which would begin anew
        print(f"\n{pipeline.out}: stopped; to go on: {again}", flush=True)
        return code
    n_done = sum(action.does != "skip" for action in actions)
    took = sum(state.nodes[a.node.name]["seconds"] for a in actions if a.does != "skip")
    words = f"{n_done} of {len(actions)} nodes in {duration(took)}" if n_done else "all nodes are done: nothing to do"
    print(f"\n{pipeline.out}: {words}", flush=True)
    return 0


def _state_of(pipeline: Pipeline) -> State:
    """What is kept, with what killed replacements left swept away. For the process that holds the lock."""
    for path in pipeline.out.glob(".pipeline.json.tmp-*"):
        disk.unlink(path)
    state = State.read(pipeline)
    if state.nodes and not set(state.nodes) & set(pipeline.nodes):
        raise UserError(
            f"{pipeline.out}: is the folder of another pipeline, {state.path} knows {', '.join(state.nodes)}: choose "
            "another `out`"
        )
    return state


# --- the plan --------------------------------------------------------------------------------------------------------


def _dry_run(pipeline: Pipeline, names: Sequence[str], args: argparse.Namespace) -> int:
    """Prints what would be done; writes nothing."""
    state = State.read(pipeline)
    if args.from_node is not None:
        for name in pipeline.behind(args.from_node) & set(state.nodes):
            if state.nodes[name]["status"] == "done":
                state.nodes[name] = {**state.nodes[name], "status": "again"}
    gpu = None if args.gpu is None else find_gpu(args.gpu)
    for line in _table(list(_rows(decide(pipeline, state, names), pipeline, state, gpu))):
        print(line)
    return 0


def _rows(actions: Sequence[Action], pipeline: Pipeline, state: State, gpu: Gpu | None) -> Iterator[Row]:
    from llmkit.pipeline.forecast import forecast

    yield ("node", "what", "does", "time", "disk", "why")
    seconds, n_bytes, unknown, guessed = 0.0, 0, 0, False
    for action in actions:
        told = forecast(action, pipeline, state, gpu)
        seconds, n_bytes = seconds + (told.seconds or 0.0), n_bytes + (told.n_bytes or 0)
        unknown += told.seconds is None
        guessed |= not told.measured and told.seconds is not None
        time = "?" if told.seconds is None else f"{'' if told.measured else '~'}{duration(told.seconds)}"
        skipped = action.does == "skip"
        why = action.why + " (the old one is renamed)" * (action.aside and not skipped)
        yield (action.node.name, action.node.does, action.does, "" if skipped else time, _size(told.n_bytes), why)
    more = f", and {unknown} of which nothing is known yet" if unknown else ""
    yield ("", "", "in all", f"{'~' * guessed}{duration(seconds)}", _size(n_bytes), more.removeprefix(", "))


def _table(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [
            text.rjust(w) if i in (3, 4) else text.ljust(w)
            for i, (text, w) in enumerate(zip(row[:5], widths, strict=True))
        ]
        yield "  ".join([*cells, row[5]]).rstrip()


def duration(seconds: float) -> str:
    """As people say it: 8 s, 4 min, 2.5 h, 3.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _size(n_bytes: int | None) -> str:
    if not n_bytes:
        return "?" if n_bytes is None else ""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"
