"""What stands between the application and replicas that may die; and a server on Ray, with one that does."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from ray.exceptions import RayActorError
from server_pictures import picture_of, png_of

from transformers_nextflow.serving import ApiError, Event, Job, deployment


class Answers:
    """Events, and then the death of a replica."""

    def __init__(self, events, dies):
        self.events, self.dies, self.cancelled = events, dies, False

    async def __aiter__(self):
        for event in self.events:
            yield event
        if self.dies:
            raise RayActorError

    def cancel(self):
        self.cancelled = True


class Replicas:
    """A handle whose replicas die after so many events."""

    def __init__(self, events, *deaths):
        self.events, self.deaths, self.asked = events, list(deaths), []
        self.run = self

    def options(self, **options):
        assert options == {"stream": True, "multiplexed_model_id": ""}
        return self

    def remote(self, job):
        number = self.deaths[len(self.asked)] if len(self.asked) < len(self.deaths) else None
        self.asked.append(Answers(self.events[:number], number is not None))
        return self.asked[-1]


EVENTS = [Event("accepted", None), Event("preview", 1), Event("preview", 2), Event("image", 3), Event("done", 4)]


@pytest.mark.parametrize("deaths", [(), (0,), (2,), (1, 3), (4, 0, 4)])
def test_a_job_goes_on_where_its_replica_died(deaths, monkeypatch):
    monkeypatch.setattr(deployment, "PAUSE", 0)
    replicas = Replicas(EVENTS, *deaths)

    async def told():
        return [event async for event in deployment.RayBackend(replicas, None).run(Job())]

    assert asyncio.run(told()) == EVENTS and len(replicas.asked) == len(deaths) + 1


def test_after_some_tries_it_is_a_503(monkeypatch):
    monkeypatch.setattr(deployment, "PAUSE", 0)
    replicas = Replicas(EVENTS, *[2] * 9)

    async def told():
        return [event async for event in deployment.RayBackend(replicas, None).run(Job())]

    with pytest.raises(ApiError) as error:
        asyncio.run(told())
    assert error.value.status == 503 and error.value.retry_after and len(replicas.asked) == deployment.TRIES


def test_who_leaves_cancels_at_the_replica_and_errors_are_errors():
    replicas = Replicas([EVENTS[0], Event("error", ApiError("full", 429))])

    async def leave():
        events = deployment.RayBackend(replicas, None).run(Job())
        await anext(events)
        await events.aclose()
        with pytest.raises(ApiError, match="full"):
            [event async for event in deployment.RayBackend(replicas, None).run(Job())]

    asyncio.run(leave())
    assert all(answers.cancelled for answers in replicas.asked) and len(replicas.asked) == 2


def test_wrong_settings_are_told_before_anything_is_built(tmp_path):
    for values, message in [({"max_bach": 1}, "max_bach"), ({"model": str(tmp_path)}, "config.json")]:
        with pytest.raises(ValueError, match=message):
            deployment.build(values)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RAY_TESTS"), reason="starts a Ray cluster, which takes minutes: RAY_TESTS=1")
def test_a_server_with_two_replicas_of_which_one_is_killed(tiny_random_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers_nextflow.serving", "--model", str(tiny_random_checkpoint)]
    command += ["--name", "tiny", "--replicas", "2", "--threads", "1", "--port", str(port)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0, timeout=600)
        asyncio.run(converse(client, server.pid))
        wait_for(f"http://127.0.0.1:{port}/metrics", server, b"ray_nextflow_rows")  # Ray collects them now and then
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def wait_for(url, server, word=b"ok"):
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                if word in answer.read():
                    return
        except OSError:
            pass
        time.sleep(1)
    raise TimeoutError(url)


async def converse(client, server):
    async def draw(seed):
        answer = await client.images.generate(prompt="a", extra_body={"seed": seed})
        return picture_of(answer.data[0].b64_json)

    alone = [await draw(seed) for seed in range(4)]
    edited = await client.images.edit(image=("a.png", png_of(alone[0])), prompt="b")
    assert picture_of(edited.data[0].b64_json).size == (80, 80)

    # Conversations go on at whichever replica, also at one that has never heard of them.
    async def say(text, previous, seed):
        tool = {"tools": [{"type": "image_generation"}], "tool_choice": {"type": "image_generation"}}
        follow = {"previous_response_id": previous, "extra_body": {"seed": seed}}
        return await client.responses.create(model="tiny", input=text, **tool, **follow)

    first = await say("a", openai.omit, 0)
    seconds = [await say("b", first.id, 1) for _ in range(6)]
    third = await say("c", seconds[0].id, 2)
    known = {seconds[0].output[0].result}
    assert {answer.output[0].result for answer in seconds} == known
    replicas = list_replicas(server)
    assert len(replicas) == 2
    for replica in replicas:  # one is killed between turns, and then the other
        os.kill(replica, signal.SIGKILL)
        again = await asyncio.gather(*(say("b", first.id, 1) for _ in range(4)), say("c", seconds[1].id, 2))
        assert {answer.output[0].result for answer in again[:4]} == known
        assert again[4].output[0].result == third.output[0].result
    together = asyncio.gather(*(draw(seed % 4) for seed in range(16)))
    os.kill(list_replicas(server)[0], signal.SIGKILL)
    assert [picture.tobytes() for picture in await together] == [alone[seed % 4].tobytes() for seed in range(16)]


def list_replicas(server):
    """The processes of replicas in a server's session of processes, so that no other server is touched."""
    command = ["ps", "-o", "pid,args", "--sid", str(server)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "ray::" in line and "NextFlowModel" in line]
