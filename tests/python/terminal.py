"""Runs a command in a terminal of its own, types keys, ends it, and prints what was on the screen as JSON."""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time

parser = argparse.ArgumentParser()
parser.add_argument("--columns", type=int, default=80)
parser.add_argument("--lines", type=int, default=24)
parser.add_argument("--keys", default="")
parser.add_argument("--end", default="q", help="the key, or the signal, that ends it")
parser.add_argument("--colours", action="store_true", help="without NO_COLOR")
parser.add_argument("--whole", action="store_true", help="waits until it has ended, and prints all that it wrote")
parser.add_argument("command", nargs="+")
arguments = parser.parse_args()

# Of our own, and not by forkpty: the terminal outlives the command, and can be looked at.
master, terminal = pty.openpty()
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", arguments.lines, arguments.columns, 0, 0))
before = termios.tcgetattr(terminal)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    os.environ["TERM"] = "xterm"
    if arguments.colours:
        os.environ.pop("NO_COLOR", None)
    else:
        os.environ["NO_COLOR"] = "1"
    os.execv(arguments.command[0], arguments.command)

output = b""
status = None


def read_until(done, seconds):
    """Reads what is drawn until a condition holds; whether it does."""
    global output, status
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        if select.select([master], [], [], 0.05)[0]:
            output += os.read(master, 65536)
        if status is None:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
    return True


def frames():
    """The pictures so far; the last one may not be whole."""
    return output.split(b"\x1b[1;1H")[1:]


def screen():
    """The lines of the last whole picture."""
    whole = [frame for frame in frames() if b"hold" in frame or arguments.columns < 80]
    lines = re.split(r"\x1b\[\d+;1H", whole[-1].decode()) if whole else []
    return [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in lines]


if arguments.whole:
    if not read_until(lambda: status is not None, 20):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    read_until(lambda: not select.select([master], [], [], 0.05)[0], 5)
    print(json.dumps({"status": status, "output": output.decode()}))
    raise SystemExit

read_until(lambda: len(frames()) >= 2, 20)
for key in arguments.keys:
    seen = len(frames())
    os.write(master, key.encode())
    read_until(lambda: len(frames()) > seen, 20)
seen = len(frames())
read_until(lambda: len(frames()) > seen, 20)
if arguments.end.startswith("SIG"):
    os.kill(child, getattr(signal, arguments.end))
else:
    os.write(master, arguments.end.encode())
if not read_until(lambda: status is not None, 20):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
read_until(lambda: not select.select([master], [], [], 0.05)[0], 5)
print(
    json.dumps(
        {
            "status": status,
            "restored": termios.tcgetattr(terminal) == before,
            "left": output.rstrip().endswith(b"\x1b[?7h\x1b[?25h\x1b[?1049l"),
            "screen": [line for line in screen() if line],
        }
    )
)
