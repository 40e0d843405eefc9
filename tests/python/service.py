"""A service on FastAPI and uvicorn; `scenario.py` says what it answers."""

import asyncio
import json
import socket

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import scenario

arguments = scenario.arguments()
state = scenario.State(json.loads(arguments.scenario))
app = FastAPI()


class Protocol(HttpToolsProtocol):
    """Lets a handler reach its connection, to break it."""

    def on_message_begin(self):
        super().on_message_begin()
        self.scope["mesh.transport"] = self.transport


@app.get("/ledger")
async def ledger(start: int = 0, size: int = 5000):
    return Response(json.dumps(state.page(start, size)), media_type="application/json")


@app.get("/ledger/wait")
async def wait(total: int, timeout: float):
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while state.total() < total and loop.time() < deadline:
        grown = asyncio.Event()
        state.listeners.append(grown.set)
        if state.total() < total:
            try:
                await asyncio.wait_for(grown.wait(), deadline - loop.time())
            except TimeoutError:
                pass
    return {"total": state.total()}


@app.delete("/ledger")
async def reset():
    state.reset()
    return {}


@app.put("/scenario")
async def set_scenario(request: Request):
    state.set_scenario(await request.json())
    return {}


@app.post("/{path:path}")
async def handle(path: str, request: Request):
    body = await request.body()
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
    answer = state.receive("/" + path, headers, body)
    if answer.delay:
        await asyncio.sleep(answer.delay)
    if answer.hang:
        await asyncio.Event().wait()
    if answer.close:
        request.scope["mesh.transport"].abort()
    response = Response(answer.body, answer.status, media_type=answer.content_type if answer.body else None)
    response.raw_headers.extend(answer.headers)
    return response


class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        scenario.ready(sockets[0].getsockname()[1])


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", arguments.port))
config = uvicorn.Config(app, http=Protocol, loop="uvloop", log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=600)
Server(config).run(sockets=[listener])
