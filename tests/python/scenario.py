"""What the test services answer, and the ledger of what they were given. Knows no web framework.

A scenario is JSON, the same that `mesh_tests::service::Scenario` writes:

    {"paths": {"/price": [RULE, ...]}, "otherwise": [RULE, ...], "bodies": true, "headers": false}

The first rule whose conditions all hold gives the answer; without one it is 200 with the request's own body.

    {"if": {"json": false, "attempt_below": 3, "calls_below": 5, "calls_of_record_below": 1,
            "field_below": ["round", 99], "field_equals": ["name", "John"], "key": "k1"},
     "delay_ms": 0, "hang": false, "close": false, "status": 200,
     "body": "echo" | "none" | {"text": ""} | {"json": {}} | {"base64": ""} | {"add": {}} | {"increment": "round"} | {"size": 1000},
     "content_type": "application/json", "headers": [["mesh-key", "k"]], "raw_headers": [["x", "<base64>"]]}
"""

import argparse
import base64
import json
import os
import sys
import threading
import time
import urllib.parse


class Answer:
    """An answer that a framework is to give."""

    __slots__ = ("status", "body", "content_type", "headers", "delay", "hang", "close")

    def __init__(self, rule, body, content_type):
        self.status = rule.get("status", 200)
        self.delay = rule.get("delay_ms", 0) / 1000
        self.hang = rule.get("hang", False)
        self.close = rule.get("close", False)
        self.content_type = rule.get("content_type") or content_type
        self.headers = [(name.encode(), value.encode()) for name, value in rule.get("headers", ())]
        self.headers += [(name.encode(), base64.b64decode(value)) for name, value in rule.get("raw_headers", ())]
        self.body = make_body(rule.get("body", "echo"), body)


def make_body(spec, body):
    if spec == "echo":
        return body
    if spec == "none":
        return b""
    if "text" in spec:
        return spec["text"].encode()
    if "json" in spec:
        return json.dumps(spec["json"], separators=(",", ":")).encode()
    if "base64" in spec:
        return base64.b64decode(spec["base64"])
    if "add" in spec:
        return json.dumps({**json.loads(body), **spec["add"]}, separators=(",", ":")).encode()
    if "increment" in spec:
        value = json.loads(body)
        value[spec["increment"]] = value.get(spec["increment"], 0) + 1
        return json.dumps(value, separators=(",", ":")).encode()
    if "size" in spec:
        return b"x" * spec["size"]
    raise ValueError(f"unknown body: {spec!r}")


class State:
    """The scenario in force and the ledger. Its methods may be called from any thread."""

    def __init__(self, scenario):
        self.lock = threading.Lock()
        self.grown = threading.Condition(self.lock)
        self.listeners = []
        self.set_scenario(scenario)
        self.reset()

    def set_scenario(self, scenario):
        with self.lock:
            self.scenario = scenario

    def reset(self):
        with self.lock:
            self.entries = []
            self.calls = {}
            self.calls_of_record = {}

    def receive(self, path, headers, body):
        """Writes a delivery into the ledger and says what to answer. `headers` have lower-case names."""
        with self.lock:
            calls = self.calls.get(path, 0)
            self.calls[path] = calls + 1
            identity = headers.get("mesh-id", "")
            of_record = self.calls_of_record.get((path, identity), 0)
            self.calls_of_record[(path, identity)] = of_record + 1
            scenario = self.scenario
            entry = {
                "n": len(self.entries),
                "path": path,
                "id": identity,
                "route": headers.get("mesh-route", ""),
                "topic": headers.get("mesh-topic", ""),
                "partition": int(headers.get("mesh-partition", -1)),
                "offset": int(headers.get("mesh-offset", -1)),
                "attempt": int(headers.get("mesh-attempt", 0)),
                "hops": int(headers.get("mesh-hops", -1)),
                "key": urllib.parse.unquote(headers["mesh-key"]) if "mesh-key" in headers else None,
                "time_ms": int(time.time() * 1000),
            }
            if scenario.get("bodies", True):
                entry["body"] = base64.b64encode(body).decode()
            if scenario.get("headers", False):
                entry["headers"] = headers
            self.entries.append(entry)
            self.grown.notify_all()
            listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener()
        rules = scenario.get("paths", {}).get(path, scenario.get("otherwise", []))
        content_type = headers.get("content-type", "application/json")
        for rule in rules:
            if holds(rule.get("if", {}), headers, body, calls, of_record):
                return Answer(rule, body, content_type)
        return Answer({}, body, content_type)

    def total(self):
        with self.lock:
            return len(self.entries)

    def page(self, start, size):
        with self.lock:
            return {"total": len(self.entries), "entries": self.entries[start : start + size]}

    def wait(self, total, timeout):
        """Waits until the ledger has `total` entries."""
        with self.grown:
            self.grown.wait_for(lambda: len(self.entries) >= total, timeout)
            return len(self.entries)


def holds(condition, headers, body, calls, of_record):
    if "json" in condition and (parse(body) is not None) != condition["json"]:
        return False
    if "attempt_below" in condition and not int(headers.get("mesh-attempt", 0)) < condition["attempt_below"]:
        return False
    if "calls_below" in condition and not calls < condition["calls_below"]:
        return False
    if "calls_of_record_below" in condition and not of_record < condition["calls_of_record_below"]:
        return False
    if "key" in condition and headers.get("mesh-key") != condition["key"]:
        return False
    if "field_below" in condition:
        field, bound = condition["field_below"]
        value = parse(body)
        if not isinstance(value, dict) or not value.get(field, 0) < bound:
            return False
    if "field_equals" in condition:
        field, wanted = condition["field_equals"]
        value = parse(body)
        if not isinstance(value, dict) or value.get(field) != wanted:
            return False
    return True


def parse(body):
    try:
        return json.loads(body)
    except ValueError:
        return None


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--scenario", default="{}")
    return parser.parse_args()


def ready(port):
    """Tells the harness that the service listens, and ends the process when the harness is gone."""

    def watch():
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    print(f"READY {port}", flush=True)
