"""A whole server in one process: an engine and the application on it, without Ray. For tests, and inside programs."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from ..session import Transcript
from .application import build_app
from .engine import Engine
from .jobs import Event, Job
from .sessions import Transcripts
from .settings import ServingSettings


class LocalBackend:
    """An engine in this process as what runs jobs."""

    def __init__(self, engine: Engine):
        self.engine, self.transcripts = engine, Transcripts(engine.settings.max_responses)

    def run(self, job: Job) -> AsyncIterator[Event]:
        return self.engine.run(job)

    async def status(self) -> dict[str, Any]:
        return await self.engine.status()

    async def metrics(self) -> str:
        return "".join(f"nextflow_{name} {value}\n" for name, value in (await self.status()).items())

    async def put(self, name: str, transcript: Transcript) -> None:
        self.transcripts.put(name, transcript)

    async def get(self, name: str) -> Transcript:
        return self.transcripts.get(name)


def local_app(settings: ServingSettings, engine: Engine | None = None) -> FastAPI:
    """The application with an engine of its own: any ASGI server runs it."""
    return build_app(settings, LocalBackend(engine or Engine(settings)))


__all__ = ["LocalBackend", "local_app"]
