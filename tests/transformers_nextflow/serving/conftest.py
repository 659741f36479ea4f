"""A server in this process, which OpenAI's own client talks to.

The extra `[dev]` has what these tests need but for Ray; without it they are left out, as those of Ray are without Ray.
"""

import asyncio
from importlib.util import find_spec

import pytest

if not all(map(find_spec, ("fastapi", "openai", "httpx2", "python_multipart", "yaml"))):
    collect_ignore_glob = ["test_*.py"]
elif find_spec("ray") is None:
    collect_ignore = ["test_deployment.py"]


@pytest.fixture(scope="package")
def parts(tiny_random_checkpoint):
    """The tiny random model, sharpened, and its processor, as an engine loads them."""
    from random_weights import sharpen
    from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor

    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    sharpen(model)
    model.config.max_position_embeddings = 2048
    return model, NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


@pytest.fixture
def settings(tiny_random_checkpoint):
    """Makes settings of the tiny random model, called "tiny"."""
    from transformers_nextflow.serving.settings import ServingSettings

    return lambda **values: ServingSettings.of({"model": str(tiny_random_checkpoint), "name": "tiny", **values})


@pytest.fixture
def engine(parts, settings):
    """Makes engines with the tiny random model."""
    from transformers_nextflow.serving import Engine

    return lambda **values: Engine(settings(**values), *parts)


@pytest.fixture
def talk(engine):
    """Runs `conversation(client, http)` against a server: OpenAI's client, and a plain one for requests of any kind."""
    import httpx2 as httpx
    import openai

    from transformers_nextflow.serving.local import LocalBackend, build_app

    def run(conversation, key="any", own_engine=None, **values):
        served = own_engine or engine(**values)

        async def connect():
            app = build_app(served.settings, LocalBackend(served))
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                url = "http://server/v1"
                client = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=http)
                return await conversation(client, http)

        return asyncio.run(connect())

    return run
