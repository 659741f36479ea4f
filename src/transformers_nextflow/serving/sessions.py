"""Conversations between their turns: keys and values while there is room, text and codes for as long as it matters."""

from collections import OrderedDict
from typing import Any

from ..session import NextFlowSession, Transcript
from .errors import ApiError
from .jobs import Job
from .settings import ServingSettings


class Sessions:
    """The sessions of an engine, by the name of the answer that each ends with. For the thread that draws.

    Those that were used least lately are moved to the CPU's memory, and then dropped: from its transcript a session is
    made again, so nothing is lost but time.
    """

    def __init__(self, model: Any, processor: Any, settings: ServingSettings):
        self.model, self.processor, self.settings = model, processor, settings
        self._held: OrderedDict[str, NextFlowSession] = OrderedDict()
        self._away: set[str] = set()  # those that are offloaded

    def open(self, job: Job) -> NextFlowSession:
        """A session that goes on from `job.previous`; others may go on from there, too."""
        if job.previous is not None and job.previous in self._held:
            self._held.move_to_end(job.previous)
            return self._held[job.previous].fork()
        if job.transcript is not None:
            return NextFlowSession.from_transcript(self.model, self.processor, job.transcript)
        return NextFlowSession(self.model, self.processor)

    def keep(self, name: str, session: NextFlowSession) -> None:
        """Holds a session for the turns that follow."""
        self._held[name] = session
        on_device = total = 0
        for held in reversed(list(self._held)):
            num_bytes = self._held[held].memory.num_bytes
            total += num_bytes
            if total > self.settings.session_host_bytes:
                del self._held[held]
                self._away.discard(held)
                total -= num_bytes
            elif held not in self._away:
                on_device += num_bytes
                if on_device > self.settings.session_bytes:
                    self._held[held].offload()
                    self._away.add(held)
                    on_device -= num_bytes

    @property
    def memory(self) -> tuple[int, int]:
        """The number of sessions, and their bytes; what several share counts for each."""
        held = list(self._held.values())
        return len(held), sum(session.memory.num_bytes for session in held)


class Transcripts:
    """What answers ended with, for all replicas; the oldest are forgotten when there are too many."""

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[str, Transcript] = OrderedDict()

    def put(self, name: str, transcript: Transcript) -> None:
        self._kept[name] = transcript
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def get(self, name: str) -> Transcript:
        """Raises an [`ApiError`] if there is none."""
        if name not in self._kept:
            raise ApiError(
                f'There is no answer "{name}" to go on from: it is unknown, was not stored, or was long ago.',
                status=404,
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(name)
        return self._kept[name]


__all__ = ["Sessions", "Transcripts"]
