"""The server on Ray Serve: replicas with a model each, and before them the web application.

`serve run transformers_nextflow.serving.deployment:build model=FOLDER` and a `RayService` use `build` as it is.
"""

import asyncio
import logging
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.util.metrics import Gauge

from ..session import Transcript
from .application import build_app
from .engine import Engine
from .errors import ApiError
from .jobs import Event, Job
from .sessions import Transcripts
from .settings import ServingSettings

logger = logging.getLogger(__name__)

TRIES = 4
PAUSE = 0.5  # seconds before a job goes to another replica; doubled every time
METRICS = ("ray_nextflow_", "ray_serve_")


def model_replica(settings: ServingSettings) -> Any:
    """The class of the replicas; Ray wants to know their number of adapters beforehand."""

    class NextFlowModel:
        """A model."""

        def __init__(self, values: dict[str, Any]):
            self.engine = Engine(ServingSettings.of(values))
            self.gauges: dict[str, Gauge] = {}

        async def run(self, job: Job) -> AsyncIterator[Event]:
            try:
                if job.adapter is not None:
                    await self.adapter(job.adapter)
                async for event in self.engine.run(job):
                    yield event
            except ApiError as error:
                yield Event("error", error)
            finally:
                await self.report()

        @serve.multiplexed(max_num_models_per_replica=settings.max_adapters)
        async def adapter(self, name: str) -> str:
            """Tells Ray that jobs with this adapter had better come here; the engine loads it when one is drawn."""
            return name

        async def status(self) -> dict[str, Any]:
            return await self.engine.status()

        async def report(self) -> None:
            for name, value in (await self.engine.status()).items():
                gauge = self.gauges.setdefault(name, Gauge(f"nextflow_{name}", f"{name} of a replica"))
                gauge.set(value)

        def check_health(self) -> None:
            self.engine.check_health()

    return NextFlowModel


class TranscriptStore:
    """What answers ended with, for all replicas of the application."""

    def __init__(self, limit: int):
        self.transcripts = Transcripts(limit)

    async def put(self, name: str, transcript: Transcript) -> None:
        self.transcripts.put(name, transcript)

    async def get(self, name: str) -> Transcript | ApiError:
        try:
            return self.transcripts.get(name)
        except ApiError as error:
            return error


class RayBackend:
    """Replicas elsewhere as what runs jobs."""

    def __init__(self, model: Any, transcripts: Any):
        self.model, self.transcripts = model, transcripts

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """As the engine's. A job whose replica dies goes to another: its seed gives the same events, and those that are
        known are not told again."""
        handle = self.model.options(stream=True, multiplexed_model_id=job.adapter or "")
        told = 0
        for number in range(TRIES):
            answers = handle.run.remote(job)
            seen = 0
            try:
                async for event in answers:
                    seen += 1
                    if event.kind == "error":
                        raise event.value
                    if seen > told:
                        told = seen
                        yield event
                return
            except (RayActorError, RayServeException) as error:
                logger.warning("A replica is gone (%s); try %d of %d", type(error).__name__, number + 1, TRIES)
                await asyncio.sleep(PAUSE * 2**number)
            finally:
                answers.cancel()
        raise ApiError("No replica could finish this request. Try again later.", 503, code="unavailable", retry_after=5)

    async def status(self) -> dict[str, Any]:
        try:
            return await self.model.status.remote()
        except (RayActorError, RayServeException) as error:
            raise ApiError("No replica is there.", 503, code="unavailable", retry_after=5) from error

    async def metrics(self) -> str:
        """What Ray exports of this server, on all nodes."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        pages = await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls))
        lines = [line for page in pages for line in page.splitlines()]
        return "".join(
            f"{line}\n" for line in lines if line.replace("# HELP ", "").replace("# TYPE ", "").startswith(METRICS)
        )

    async def put(self, name: str, transcript: Transcript) -> None:
        await self.transcripts.put.remote(name, transcript)

    async def get(self, name: str) -> Transcript:
        kept = await self.transcripts.get.remote(name)
        if isinstance(kept, ApiError):
            raise kept
        return kept


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as page:
        return page.read().decode()


class Front:
    """The web application."""

    def __init__(self, values: dict[str, Any], model: Any, transcripts: Any):
        self.settings, self.backend = ServingSettings.of(values), RayBackend(model, transcripts)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.settings, self.backend)


def build(args: dict[str, Any] | None = None) -> Any:
    """The Serve application of [`ServingSettings`]. Wrong ones are a `ValueError` before anything runs."""
    settings = ServingSettings.of(dict(args or {}))
    values = settings.model_dump() | {"model": str(settings.folder.resolve()), "name": settings.model_name}
    gpus = settings.gpus
    if gpus is None:
        gpus = float(torch.cuda.is_available() and settings.device != "cpu")
    model = serve.deployment(
        name="NextFlowModel",
        num_replicas=settings.replicas,
        # More than the engine takes, so that it is the engine that says no, with a 429.
        max_ongoing_requests=2 * settings.max_queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=30,
    )(model_replica(settings))
    front = serve.deployment(
        name="Front",
        max_ongoing_requests=4 * settings.max_queue * settings.replicas,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Front))
    store = serve.deployment(name="TranscriptStore", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(
        TranscriptStore
    )
    return front.bind(values, model.bind(values), store.bind(settings.max_responses))


__all__ = ["RayBackend", "build"]
