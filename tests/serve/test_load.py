"""Ten times more clients than there is room for, shortly: nothing breaks, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest

from griffin.serve.settings import Settings
from tests.serve.conftest import running
from tests.serve.load import storm

pytestmark = pytest.mark.slow


def test_a_storm_leaves_nothing(folder: Path) -> None:
    settings = Settings(model=str(folder), slots=2, max_queue=2, snapshot_bytes=2**22)
    with running(settings) as served:
        asyncio.run(storm("127.0.0.1", served.port, 2, 8))  # what is made once is made
        served.until(lambda: not served.server.server_state.connections, 60)
        gc.collect()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        seen = asyncio.run(storm("127.0.0.1", served.port, 12, 40))
        assert not seen.faults, seen.faults[:5]
        assert seen.statuses["200"] > 20
        assert seen.statuses["429"] > 20
        assert seen.statuses["400"] > 5
        assert seen.refused_p99_s() < 2  # beside other work; docs/serving.md has what was measured alone
        served.until(lambda: served.engine.busy == 0 and served.engine.waiting == 0, 60)
        served.until(lambda: not served.server.server_state.connections and not served.worker._answers, 60)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= files + 1
        assert threading.active_count() <= threads + 4  # asyncio's pool grows to its size, no further
        assert served.call("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
