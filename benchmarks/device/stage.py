"""One stage in this process: `python -m benchmarks.device.stage NAME LOG DEVICE [arguments]`, by device_run."""

from __future__ import annotations

import sys
from pathlib import Path

from .log import Log


def main(argv: list[str]) -> None:
    name, path, device, *rest = argv
    log = Log(Path(path))
    if name == "fingerprint":
        from .machine import fingerprint

        fingerprint(log, device)
    elif name == "ceilings":
        from .machine import ceilings

        ceilings(log, device)
    elif name == "correct":
        from .correct import correct

        correct(log, device, rest[0], rest[1], few=device == "cpu")
    elif name == "time":
        from .cases import cases
        from .timing import time_case

        wanted, ours = int(rest[0]), [b for b in rest[1].split(",") if b]
        time_case(log, device, list(cases(device == "cpu"))[wanted], ours)
    elif name == "profile":
        from .profile import run_for_profiler

        run_for_profiler(device, int(rest[0]), rest[1])
    else:
        raise SystemExit(f"benchmarks.device.stage: expected a stage, got {name!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
