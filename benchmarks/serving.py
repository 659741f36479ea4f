"""Load on a server: throughput of one client and of many, the time to the first preview, overload, memory.

Start a server, then point this at it:

    python -m transformers_nextflow.serving --port 8000 &
    python benchmarks/serving.py --url http://127.0.0.1:8000 --clients 16 --pictures 64
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter

import aiohttp

PROMPTS = ["a red circle left of a blue square", "a green triangle", "three yellow stars", "a black ring above a heart"]


async def draw(session: aiohttp.ClientSession, url: str, number: int, previews: int) -> tuple[int, float, float | None]:
    """The status, the seconds until the picture, and until the first preview."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "stream": True, "partial_images": previews}
    start, first = time.perf_counter(), None
    async with session.post(f"{url}/v1/images/generations", json=body) as answer:
        status, ended = answer.status, False
        async for line in answer.content:
            if first is None and line.startswith(b"event: image_generation.partial_image"):
                first = time.perf_counter() - start
            ended = ended or line.startswith(b"event: image_generation.completed")
            if line.startswith(b"event: error"):
                status = 599
    if status == 200 and not ended:
        status = 598  # it broke off
    return status, time.perf_counter() - start, first


async def load(url: str, clients: int, pictures: int, previews: int) -> dict:
    """So many clients, each of which asks again when it has its picture."""
    numbers = iter(range(pictures))
    results: list[tuple[int, float, float | None]] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            results.append(await draw(session, url, number, previews))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - start
    right = sorted(result[1] for result in results if result[0] == 200)
    firsts = [result[2] for result in results if result[2] is not None]
    return {
        "clients": clients,
        "pictures": len(right),
        "statuses": dict(Counter(result[0] for result in results)),
        "pictures_per_second": round(len(right) / seconds, 3),
        "p50_seconds": round(right[len(right) // 2], 3) if right else None,
        "p95_seconds": round(right[min(len(right) - 1, int(0.95 * len(right)))], 3) if right else None,
        "first_preview_seconds": round(statistics.median(firsts), 3) if firsts else None,
    }


async def run(arguments: argparse.Namespace) -> None:
    url = arguments.url.rstrip("/")
    await load(url, 1, 2, 0)  # warm
    one = await load(url, 1, max(4, arguments.pictures // 4), arguments.previews)
    print(json.dumps(one), flush=True)
    many = await load(url, arguments.clients, arguments.pictures, arguments.previews)
    print(json.dumps(many), flush=True)
    if one["pictures_per_second"]:
        print(json.dumps({"gain": round(many["pictures_per_second"] / one["pictures_per_second"], 2)}), flush=True)
    if arguments.overload:
        print(json.dumps(await load(url, arguments.overload, arguments.overload, 0)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--previews", type=int, default=1)
    parser.add_argument("--overload", type=int, default=0, help="clients at once, to see them refused")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
