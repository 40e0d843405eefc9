"""The five services of routes.yaml in one small server: python3 deploy/example/services.py

Standard library only. None of them knows a broker, a topic or another service.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def price(order):
    return 200, {**order, "total": order["quantity"] * order["price"]}


def check(order):  # the `if`: 204 forwards nothing
    return (200, {"review": order}) if order["total"] > 1000 else (204, None)


def ship(order):
    return 200, {"item": order["item"], "left": order["quantity"]}


def pack(parcel):  # the `for`: a round for each item, until 204
    return (200, {**parcel, "left": parcel["left"] - 1}) if parcel["left"] > 0 else (204, None)


def keep(_):
    return 200, {"kept": True}


HANDLERS = {"/price": price, "/check": check, "/ship": ship, "/pack": pack, "/keep": keep}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        handler = HANDLERS.get(self.path)
        try:
            status, answer = handler(json.loads(body)) if handler else (404, None)
        except (ValueError, KeyError, TypeError) as error:  # this record can never be handled: dead letter
            status, answer = 400, {"error": repr(error)}
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        key = self.headers.get("mesh-key", "-")
        sys.stdout.write(f"{key:<10} {self.headers.get('mesh-topic', '-'):>14} -> {self.path}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    print(f"services on http://127.0.0.1:{port}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
