"""The system calls of one exec, in order, with who makes them.

docs/developing/exec-syscalls.md explains them.

    python benchmarks/syscalls.py

The frozen agent serves natively, warm; strace watches one exec of a static program that does
nothing. Repeated calls are shown once with their number. The program's own calls are left out.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from agentalone import TOKEN, AgentAlone
from floor import Floor

WARM = 200  # execs before the one that is watched
ATTACHED_WITHIN = 10.0  # seconds until strace says that it watches
# "PID call(arguments) = result"; where two processes overlap, the second half is a line of its own
# that does not match.
LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<rest>.*)")
RESULT = re.compile(r"\)? += .*| ?<(unfinished|detached) \.\.\.>")
TEXT = re.compile(r'"[^/](?:[^"\\]|\\.)*"\.{0,3}')  # other than paths
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
SHOWN = 72  # characters of the arguments


def main() -> int:
    """Print the list and its length."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        floor = Floor(Path(folder))
        with AgentAlone(floor.folder) as agent:
            request = floor.request("true", TOKEN, str(floor.true))
            floor.run("exec", agent.socket_path, WARM, request)
            lines = watch(agent.pid, floor, agent.socket_path, request)
        calls = list(one_exec(lines, str(agent.pid)))
    for who in ("agent", "child"):
        print(f"{who}: {sum(1 for caller, _ in calls if caller == who)} calls")
    print()
    for (who, shown), repeated in groupby(calls, key=lambda call: (call[0], call[1])):
        times = len(list(repeated))
        print(f"{who}  {shown}" + (f"  and {times - 1} more" if times > 1 else ""))
    return 0


def watch(pid: int, floor: Floor, socket_path: Path, request: Path) -> list[str]:
    """What strace wrote while two execs ran; the second is a whole one."""
    trace = floor.folder / "trace"
    argv = ["strace", "-f", "-p", str(pid), "-o", str(trace), "-s", "24"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        strace.stderr.readline()  # "strace: Process … attached"
        time.sleep(0.2)
        try:
            floor.run("exec", socket_path, 2, request)
            time.sleep(0.2)
        finally:
            strace.terminate()
            strace.wait(ATTACHED_WITHIN)
    return trace.read_text().splitlines()


def one_exec(lines: list[str], agent: str) -> Iterator[tuple[str, str]]:
    """(caller, call) from the last accept on; of the child until its execve."""
    starts = [at for at, line in enumerate(lines) if line.startswith(agent) and "accept4(" in line]
    executed = False
    for line in lines[starts[-1] :]:
        match = LINE.match(line)
        if match is None:
            continue
        if match["pid"] == agent:
            yield "agent", shown(match["call"], match["rest"])
        elif not executed:
            yield "child", shown(match["call"], match["rest"])
            executed = match["call"] == "execve"


def shown(call: str, rest: str) -> str:
    """The call with its arguments, short. Signals' numbers go, so that their calls are alike."""
    if call == "rt_sigaction":
        return "rt_sigaction(…, SIG_DFL)"
    arguments = ADDRESS.sub("…", TEXT.sub('"…"', RESULT.sub("", rest)))
    short = arguments if len(arguments) <= SHOWN else arguments[: SHOWN - 1] + "…"
    return f"{call}({short})"


if __name__ == "__main__":
    sys.exit(main())
