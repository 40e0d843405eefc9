"""Reads Server-Sent Events with aiohttp: sse_client.py URL COUNT prints the data of COUNT events, one a line."""

import asyncio
import sys

import aiohttp


async def main(url, count):
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(url, headers={"accept": "text/event-stream"}) as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                sys.exit(f"{response.status} {response.content_type}: {await response.text()}")
            data = []
            async for line in response.content:
                line = line.decode().rstrip("\r\n")
                if line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    print("\n".join(data), flush=True)
                    data, count = [], count - 1
                    if count == 0:
                        return


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
