"""Ten times more clients than there is room for: python -m tests.serve.load URL SECONDS CLIENTS.

Ordinary ones, whole and streamed; some that leave, some that do not read, some that send what is no request. It counts
answers by status and how long a refusal took; a 5xx, or a connection that ends where none should, is a fault.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Seen:
    """What clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)  # how long each 429 took
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def refused_p99_s(self) -> float:
        return sorted(self.refused_s)[int(0.99 * (len(self.refused_s) - 1))] if self.refused_s else 0.0


def request(body: bytes, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def client(host: str, port: int, until: float, seed: int, seen: Seen) -> None:
    chance = random.Random(seed)
    while time.monotonic() < until:
        kind = chance.choices(["whole", "stream", "leave", "slow", "bad"], [6, 4, 2, 0.3, 2])[0]
        words = " ".join(chance.choices(["to", "be", "or", "not", "the", "mind"], k=chance.randint(1, 60)))
        body = {"prompt": words, "max_tokens": chance.randint(1, 40), "ignore_eos": True, "stream": kind != "whole"}
        if kind == "slow":
            body |= {"max_tokens": 4000, "logprobs": 5}
        data = request(json.dumps(body).encode())
        if kind == "bad":
            data = chance.choice(
                [
                    b"GARBAGE\r\n\r\n",
                    request(b'{"prompt": '),
                    request(b'{"prompt": "a", "n": 1e99}'),
                    data[: len(data) // 2],
                ]
            )
        began = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            seen.faults.append(f"no connection: {error!r}")
            continue
        try:
            writer.write(data)
            if kind == "bad" and chance.random() < 0.5:
                continue  # and leave
            if kind == "slow":
                await asyncio.sleep(chance.uniform(0, 3))
                continue
            line = await asyncio.wait_for(reader.readline(), 120)
            status = line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
            if kind == "leave":
                continue
            content = await asyncio.wait_for(reader.read(), 120)
            seen.statuses[status] += 1
            if status == "429":
                seen.refused_s.append(time.monotonic() - began)
                await asyncio.sleep(chance.uniform(0, 0.2))  # ruder than Retry-After
            elif status.startswith("5") or (status == "closed" and kind != "bad"):
                seen.faults.append(f"{kind}: {line!r} {content[-300:]!r}")
            elif status == "200" and kind == "stream" and not content.rstrip().endswith((b"[DONE]\n\n\r\n0", b"0")):
                seen.faults.append(f"a stream without its end: {content[-100:]!r}")
            elif status == "200" and kind == "whole":
                seen.tokens += int(json.loads(content.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"])
        except (OSError, TimeoutError) as error:
            if kind != "bad":
                seen.faults.append(f"{kind}: {error!r}")
        finally:
            writer.transport.abort()


async def storm(host: str, port: int, seconds: float, clients: int) -> Seen:
    """Let `clients` do their worst for so long."""
    seen, until = Seen(), time.monotonic() + seconds
    await asyncio.gather(*[client(host, port, until, seed, seen) for seed in range(clients)])
    return seen


if __name__ == "__main__":
    address = urlsplit(sys.argv[1])
    found = asyncio.run(
        storm(address.hostname or "127.0.0.1", address.port or 80, float(sys.argv[2]), int(sys.argv[3]))
    )
    sys.stdout.write(
        f"{dict(found.statuses)}, 429 p99 {found.refused_p99_s() * 1000:.0f} ms, {found.tokens:,} tokens of whole "
        f"answers, {len(found.faults)} faults\n" + "".join(f"{fault}\n" for fault in found.faults[:20])
    )
    sys.exit(bool(found.faults))
