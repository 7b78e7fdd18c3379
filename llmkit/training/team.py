"""Processes that write one checkpoint together.

They agree through the rendezvous store, in the threads that write, while training uses the process group: no collective
waits for a disk, and none is made out of turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from llmkit.config import MachineError
from llmkit.storage import Draft, FileRecord
from llmkit.training.dist import Ranks

Begin = Callable[[str | None], Draft]
Fill = Callable[[Draft], None]
_LAST_S = 20.0  # how long the others are waited for once training has ended in an error


class Team:
    """All processes of a run, one of which commits; made once, since it counts the checkpoints."""

    def __init__(self, ranks: Ranks):
        self._ranks, self._n, self._until = ranks, 0, float("inf")

    @property
    def is_main(self) -> bool:
        return self._ranks.is_main

    def give_up(self) -> None:
        """Waits only some seconds from now on."""
        self._until = time.monotonic() + _LAST_S

    def write(
        self,
        begin: Begin,
        fill: Fill,
        commit: Fill,
        told: Callable[[OSError], MachineError],
    ) -> None:
        """One checkpoint; all call it equally often.

        Args:
            begin: makes the draft, or joins that of the name it is given.
            fill: writes this process's files.
            commit: makes the draft a checkpoint; on process 0.
            told: an error of the disk, for people.

        Raises:
            MachineError: on all, if one of them failed: then nothing is left over.
        """
        self._n += 1

        def explained(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def tried(given: Any) -> Any:
                try:
                    return work(given)
                except OSError as e:
                    raise told(e) from e

            return tried

        steps = explained(begin), explained(fill), explained(commit)
        (self._lead if self.is_main else self._follow)(f"save/{self._n}", *steps)

    def _lead(self, key: str, begin: Begin, fill: Fill, commit: Fill) -> None:
        draft: Draft | None = None
        try:
            draft = begin(None)
            self._say(f"{key}/folder", {"folder": draft.folder.name})
            fill(draft)
            self._gather(key, draft)
            commit(draft)
        except BaseException as e:
            if draft is None:
                self._say(f"{key}/folder", {"error": str(e)})
            else:
                self._hear_all(key)  # who is still writing must not write into what is being removed
                draft.discard()
            self._say(f"{key}/end", {"error": str(e)})
            raise
        self._say(f"{key}/end", {})

    def _follow(self, key: str, begin: Begin, fill: Fill, _: Fill) -> None:
        said = self._hear(f"{key}/folder")
        if "error" not in said:
            own = f"{key}/{self._ranks.process}"
            try:
                draft = begin(said["folder"])
                fill(draft)
                self._say(own, {"files": {name: [r.size, r.sha256] for name, r in draft.files.items()}})
            except BaseException as e:
                self._say(own, {"error": str(e)})
                raise
            said = self._hear(f"{key}/end")
        if "error" in said:
            raise MachineError(f"the checkpoint could not be written: {said['error']}")

    def _gather(self, key: str, draft: Draft) -> None:
        """Waits until all have written, and notes their files."""
        for number, said in self._hear_all(key).items():
            if "error" in said:
                raise MachineError(f"rank {number}: {said['error']}")
            draft.files |= {name: FileRecord(size, sha256) for name, (size, sha256) in said["files"].items()}

    def _hear_all(self, key: str) -> dict[int, dict[str, Any]]:
        return {n: self._hear(f"{key}/{n}") for n in range(1, self._ranks.processes)}

    def _say(self, key: str, value: dict[str, Any]) -> None:
        self._ranks.store.set(key, json.dumps(value))

    def _hear(self, key: str) -> dict[str, Any]:
        while not self._ranks.store.check([key]):
            if time.monotonic() > self._until:
                return {"error": "another process did not say whether its files of the checkpoint are written"}
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(self._ranks.store.get(key))
        return found
