"""Reads Server-Sent Events with aiohttp, as an EventSource does: sse_client.py URL COUNT [CUT] prints the data of COUNT events, one a line.

With CUT the client breaks its connection after every CUT events, without a word, and comes back with `last-event-id`.
"""

import asyncio
import sys

import aiohttp


async def events(session, url, state):
    """Yields the data of events, and keeps the last id, by the rules of the standard."""
    headers = {"accept": "text/event-stream"}
    if state["last"]:
        headers["last-event-id"] = state["last"]
    async with session.get(url, headers=headers) as response:
        if response.status != 200 or response.content_type != "text/event-stream":
            sys.exit(f"{response.status} {response.content_type}: {await response.text()}")
        data, last = [], state["last"]
        async for line in response.content:
            line = line.decode().rstrip("\r\n")
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                # An event without data sets the id, and nothing else.
                state["last"] = last
                if data:
                    yield "\n".join(data)
                data = []
            elif field == "data":
                data.append(value)
            elif field == "id":
                last = value


async def main(url, count, cut):
    state = {"last": ""}
    while count:
        # A session of its own each time: closing it breaks the connection.
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            seen = 0
            async for data in events(session, url, state):
                print(data, flush=True)
                count, seen = count - 1, seen + 1
                if count == 0 or seen == cut:
                    break


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
