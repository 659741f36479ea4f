"""A server for NextFlow that speaks OpenAI's API: `python -m transformers_nextflow.serving`. Needs the extra `[serve]`.

Nothing below imports it.
"""

from .engine import Engine
from .errors import ApiError
from .jobs import Event, Job, Outcome
from .settings import ServingSettings

__all__ = ["ApiError", "Engine", "Event", "Job", "Outcome", "ServingSettings"]
