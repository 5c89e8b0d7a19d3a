"""The way down: on a virtual clock, and of a real process with many open streams."""

import asyncio
import itertools
import json
import signal

import httpx
import pytest

from cmjax.serve.http.drain import Drain
from tests.http.serving import PATIENCE, serving_process
from tests.parity import FOLDER

NUM_STREAMS = 200


class Calls:
    """Calls that end when they are told to, if they listen."""

    def __init__(self, num_open, listens=True):
        self.is_draining, self.num_open, self.listens, self.cuts = False, num_open, listens, 0

    def cut(self):
        self.cuts += 1
        found = self.num_open
        if self.listens:
            self.num_open = 0
        return found


def draining(num_open, **more):
    now, calls = [10.0], Calls(num_open, **more)
    return now, calls, Drain(calls, 30.0, lambda: now[0])


def test_nothing_ends_before_a_signal():
    now, calls, drain = draining(0)
    now[0] += 1000
    assert not drain.is_over()
    assert not calls.is_draining


def test_what_finishes_in_time_is_not_cut():
    now, calls, drain = draining(3)
    drain.signal()
    assert calls.is_draining
    now[0] += 29
    assert not drain.is_over()
    calls.num_open = 0
    assert drain.is_over()
    assert (drain.num_cut, calls.cuts) == (0, 0)


@pytest.mark.parametrize("listens", [True, False])
def test_what_does_not_is_cut_and_counted_once(listens):
    now, calls, drain = draining(3, listens=listens)
    drain.signal()
    now[0] += 30
    assert not drain.is_over()
    assert (drain.num_cut, drain.seconds) == (3, 30.0)
    assert drain.is_over() == listens
    now[0] += 3  # who does not listen is not waited for
    assert drain.is_over()
    assert (drain.num_cut, calls.cuts) == (3, 1)


def test_a_second_signal_waits_for_nobody():
    now, _, drain = draining(3)
    drain.signal()
    now[0] += 5
    drain.signal()
    drain.is_over()
    assert (drain.num_cut, drain.seconds) == (3, 5.0)
    drain.signal()  # nor does a third one change anything
    assert drain.is_over()


# -- a real process ----------------------------------------------------------------------------------------------------


def options(**more):
    given = {
        "--model": FOLDER / "v3-small",
        "--ep": 2,
        "--max-num-seqs": 1,
        "--max-model-len": 64,
        "--max-num-batched-tokens": 64,
        **more,
    }
    return itertools.chain(*given.items())


BODY = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


async def read(client, path, number, begun):
    """The events of a stream; `begun` is told when its answer begins."""
    events = []
    async with client.stream("POST", path, json={**BODY, "seed": number, "stream": True}) as answer:
        begun(answer.status_code)
        async for line in answer.aiter_lines():
            if line:
                events.append(line.removeprefix("data: "))
    return events


async def cut_short(process, address, give_up):
    """Many streams and a whole answer, ended by `give_up`: what they say, and what new ones are told meanwhile."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:
        statuses, all_begun = [], asyncio.Event()

        def begun(status):
            statuses.append(status)
            if len(statuses) == NUM_STREAMS:
                all_begun.set()

        streams = [
            asyncio.ensure_future(read(client, "/v1/completions", number, begun)) for number in range(NUM_STREAMS)
        ]
        await asyncio.wait_for(all_begun.wait(), PATIENCE)
        body = {**BODY, "prompt": [BODY["prompt"]] * 4, "n": 64}
        whole = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await wait_for(lambda: num_waiting(client), lambda found: found > NUM_STREAMS)  # it has been taken, too
        process.send_signal(signal.SIGTERM)
        await wait_for(lambda: status_of(client, "/health"), lambda found: found == 503)
        refused = await client.post("/v1/completions", json=BODY)
        give_up()
        return statuses, await asyncio.gather(*streams), await whole, refused


async def wait_for(ask, is_reached):
    async with asyncio.timeout(PATIENCE):
        while not is_reached(await ask()):
            await asyncio.sleep(0.02)


async def num_waiting(client):
    return (await client.get("/status.json")).json()["num_waiting"]


async def status_of(client, path):
    return (await client.get(path)).status_code


def test_open_streams_are_told_when_they_are_cut():
    with serving_process(*options(**{"--drain-timeout": 1000})) as (process, address):
        found = asyncio.run(cut_short(process, address, lambda: process.send_signal(signal.SIGTERM)))
        statuses, streams, whole, refused = found
        assert process.wait(PATIENCE) == 3
        said = process.stderr.read()
    assert statuses == [200] * NUM_STREAMS
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    cut = [events for events in streams if "error" in json.loads(events[-2])]
    assert all(events[-1] == "[DONE]" for events in streams)
    assert cut
    assert {json.loads(events[-2])["error"]["type"] for events in cut} == {"service_unavailable_error"}
    assert (whole.status_code, whole.json()["error"]["type"]) == (503, "service_unavailable_error")
    # One line, beside those of steps that were still being compiled, and no traceback.
    assert "Traceback" not in said
    (line,) = (line for line in said.strip().splitlines() if not line.startswith("compiled "))
    assert line.startswith(f"cmjax: {len(cut) + 1} requests were cut: not finished within ")
