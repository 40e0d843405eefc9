"""Publishes lines with aiohttp, each after the answer to the one before: lines_client.py URL COUNT prints the answers, one a line.

Every tenth line is no JSON.
"""

import asyncio
import json
import sys

import aiohttp


async def main(url, count):
    answered = asyncio.Queue()

    async def lines():
        for number in range(count):
            line = "no JSON" if number % 10 == 9 else json.dumps({"key": "k", "value": {"n": number}})
            yield (line + "\n").encode()
            await answered.get()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        async with session.post(url, data=lines(), headers={"content-type": "application/x-ndjson"}) as response:
            if response.status != 200:
                sys.exit(f"{response.status}: {await response.text()}")
            async for line in response.content:
                print(line.decode().rstrip("\n"), flush=True)
                answered.put_nowait(None)


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
