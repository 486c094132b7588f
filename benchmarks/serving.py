"""The service under load: tokens a second in all, and what each of its users sees, as more of them come.

``attnlab serve`` in a process of its own; N clients at once stream an answer each over HTTP, for every sibling. Throughput is
all tokens over the time until the last client is done; the first token is timed from the request; the time per token is what
one client waits between its first and its last.

    python benchmarks/serving.py            some minutes; writes results/serving-<machine>.json
    python benchmarks/serving.py --quick    seconds, the companion, two loads; writes nothing
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from statistics import median

import httpx
import torch
from common import keep, options, script, spread

MODELS = ("companion", "multi-head", "grouped-query", "multi-query")
LOADS = (1, 2, 4, 8, 16, 32)
PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        if os.path.exists(name):"
TOKENS = 128


async def one(client: httpx.AsyncClient, path: str, n: int) -> dict:
    """One client: when its first and last token came, in seconds after its request, and how many there were."""
    start = time.perf_counter()
    first = tokens = None
    body = {"prompt": PROMPT, "stream": True, "max_tokens": TOKENS, "temperature": 1.0, "seed": n + 1}
    async with client.stream("POST", path, json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "errors" in event:
                raise RuntimeError(event)
            if first is None:
                first = time.perf_counter() - start
            tokens = event.get("usage", {}).get("completion_tokens", tokens)
    return {"first": first, "last": time.perf_counter() - start, "tokens": tokens}


async def load(url: str, name: str, n: int) -> dict:
    """``n`` clients at once: tokens a second in all, and the median client's two times."""
    limits = httpx.Limits(max_connections=n)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        path = f"{url}/client/v4/accounts/bench/ai/run/{name}"
        start = time.perf_counter()
        clients = await asyncio.gather(*(one(client, path, i) for i in range(n)))
        seconds = time.perf_counter() - start
    per_token = [(c["last"] - c["first"]) / (c["tokens"] - 1) for c in clients if c["tokens"] > 1]
    return {
        "tokens_per_second": sum(c["tokens"] for c in clients) / seconds,
        "first_token_ms": 1000 * median(c["first"] for c in clients),
        "per_token_ms": 1000 * median(per_token),
    }


def measure(name: str, loads: tuple[int, ...], repetitions: int) -> list[dict]:
    """Every load in turn, several times; the first round warms up and isn't counted."""
    command = [sys.executable, "-m", "attnlab", "serve", "--model", name, "--port", "0", "--device", "cpu",
               "--rows", str(max(loads)), "--max-len", "512"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        rounds = [{n: asyncio.run(load(url, name, n)) for n in loads} for _ in range(repetitions + 1)][1:]
    finally:
        server.terminate()
        server.wait(60)
    rows = []
    for n in loads:
        row = {"model": name, "streams": n}
        for what in rounds[0][n]:
            row[what] = spread([r[n][what] for r in rounds])
        row["times_one_stream"] = spread([r[n]["tokens_per_second"] / r[1]["tokens_per_second"] for r in rounds])
        rows.append(row)
        print(
            f"{name:14} {n:3} streams: {row['tokens_per_second']['median']:6.0f} tokens/s in all, "
            f"{row['times_one_stream']['median']:4.1f} times one stream; first token after "
            f"{row['first_token_ms']['median']:4.0f} ms, then one every {row['per_token_ms']['median']:5.1f} ms",
            flush=True,
        )
    return rows


def main() -> int:
    args = options(__doc__, "the companion, two loads, once")
    if args.quick:
        measure("companion", (1, 4), 1)
        return 0
    rows = [row for name in MODELS for row in measure(name, LOADS, 5)]
    setting = {
        "prompt": PROMPT,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "rows": max(LOADS),
        "max_len": 512,
    }
    keep("serving", args, {"setting": setting, "rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
