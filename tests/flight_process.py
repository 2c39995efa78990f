"""One cold starter as a process of its own: ``python -m tests.flight_process FOLDER SECONDS [LEASES]``.

Builds by sleeping, and leaves a line in FOLDER/builds when a build begins. Prints how it came to its result.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from workers.leases.files import FileLeases
from workers.leases.single_flight import FlightPolicy, Work, single_flight


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    leases = FileLeases(Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "leases", ttl_s=3.0)
    result = folder / "result"

    def find() -> str | None:
        return result.read_text() if result.exists() else None

    def build() -> str:
        with open(folder / "builds", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return f"made by {os.getpid()}"

    def publish(value: str) -> None:
        scratch = folder / f".new-{os.getpid()}"
        scratch.write_text(value)
        try:
            os.link(scratch, result)
        finally:
            scratch.unlink()

    policy = FlightPolicy(deadline_s=60.0, poll_s=0.1, heartbeat_s=0.3)
    flight = single_flight(Work("piece", find, build, publish), leases, policy)
    print(flight.outcome, flight.value)


if __name__ == "__main__":
    main()
