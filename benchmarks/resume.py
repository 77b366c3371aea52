"""How long a paused machine takes from being resumed to its first answer, and to its right clock.

`python benchmarks/resume.py IMAGE [ROUNDS]`. A request waits while the machine is paused and is
timed from the resumption to its answer; so is `Machine.resume`, which also sets the clock.
"""

import statistics
import sys
import threading
import time

import microguest
from microguest import Machine

PAUSE = 0.5  # seconds
ROUNDS = 20


def main() -> None:
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    answers: list[float] = []
    returns: list[float] = []
    errors: list[float] = []
    with microguest.boot(sys.argv[1], timeout=120) as machine:
        machine.agent.step_clock()
        for _ in range(rounds):
            answer, returned = one_round(machine)
            answers.append(answer)
            returns.append(returned)
            errors.append(abs(machine.agent.clock().offset))
    show("resumed → first answer", answers)
    show("resumed → clock set", returns)
    show("clock's error after that", errors)


def one_round(machine: Machine) -> tuple[float, float]:
    """Seconds until the answer, and until `resume` returned."""
    answered = [0.0]

    def ask() -> None:
        machine.agent.ping()
        answered[0] = time.monotonic()

    machine.pause()
    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(PAUSE)
    began = time.monotonic()
    machine.resume()
    returned = time.monotonic()
    asking.join()
    return answered[0] - began, returned - began


def show(what: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * value for value in seconds)
    worst = f"worst {ordered[-1]:.2f} ms"
    print(f"{what}: median {statistics.median(ordered):.2f} ms, {worst}, {len(ordered)} rounds")


if __name__ == "__main__":
    main()
