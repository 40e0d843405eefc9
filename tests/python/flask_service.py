"""The same service on a second framework: Flask and waitress; `scenario.py` says what it answers."""

import json
import time

import flask
import waitress

import scenario

arguments = scenario.arguments()
state = scenario.State(json.loads(arguments.scenario))
app = flask.Flask(__name__)


@app.get("/ledger")
def ledger():
    query = flask.request.args
    return state.page(int(query.get("start", 0)), int(query.get("size", 5000)))


@app.get("/ledger/wait")
def wait():
    query = flask.request.args
    return {"total": state.wait(int(query["total"]), float(query["timeout"]))}


@app.delete("/ledger")
def reset():
    state.reset()
    return {}


@app.put("/scenario")
def set_scenario():
    state.set_scenario(flask.request.get_json())
    return {}


@app.post("/<path:path>")
def handle(path):
    headers = {name.lower(): value for name, value in flask.request.headers}
    answer = state.receive("/" + path, headers, flask.request.get_data())
    if answer.hang or answer.close:
        raise NotImplementedError("this framework cannot hang or break a connection: take service.py")
    if answer.delay:
        time.sleep(answer.delay)
    response = flask.Response(answer.body, answer.status)
    if answer.body:
        response.headers["content-type"] = answer.content_type
    for name, value in answer.headers:
        response.headers.add(name.decode(), value.decode("latin-1"))
    return response


server = waitress.create_server(app, host="127.0.0.1", port=arguments.port, threads=16)
scenario.ready(server.effective_port)
server.run()
