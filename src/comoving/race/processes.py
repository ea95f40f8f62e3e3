"""Runs in processes of their own, one thread each: settings in, progress and a record out."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comoving.files import make_folder

Record = dict[str, Any]

PERIOD = 0.2
LOG = logging.getLogger(__name__)


class Processes:
    """Runs each run in a fresh process, and ends those still going when they are interrupted.

    Args:
        worker: the module that a process runs with the file of the record as its argument. It reads the settings of the
            run as JSON from standard input, may print lines ``{"step": ..., "loss": ...}`` and ``{"said": ...}`` (for
            the log), and writes the file.
    """

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.alive: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def __call__(self, run: Mapping[str, Any], file: Path, progress: Callable[[int, float], None]) -> Record:
        """Run it to its end; what went wrong in there comes back as a record with status "failed"."""
        make_folder(file.parent)
        log = file.with_suffix(".log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", self.worker, str(file)]
        with log.open("w", encoding="utf-8") as errors, self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            self.alive.add(process)
        assert process.stdin is not None and process.stdout is not None
        with process:
            try:
                process.stdin.write(json.dumps(run))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died before it read; its log says why
            for line in process.stdout:
                try:
                    point = json.loads(line)
                    if "said" in point:
                        LOG.warning("%s", point["said"])
                        continue
                    progress(int(point["step"]), float(point["loss"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a library's own chatter
        with self.lock:
            self.alive.discard(process)
            if self.stopped:
                raise KeyboardInterrupt
        if process.returncode != 0 or not file.exists():
            return {"status": "failed", "error": last_words(log, process.returncode)}
        log.unlink(missing_ok=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def stop(self) -> None:
        """End all processes started here."""
        with self.lock:
            self.stopped = True
            for process in self.alive:
                process.terminate()


def last_words(log: Path, code: int) -> str:
    """The last line of a log that says something: of a traceback, the exception."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"process ended by signal {-code}; see {log.name}"
    return lines[-1][:500] if lines else f"process ended with code {code}"


class Relay(logging.Handler):
    """In the process of a run: hands what is logged to the parent, whose log people see."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line of JSON."""
        sys.stdout.write(json.dumps({"said": self.format(record)}) + "\n")
        sys.stdout.flush()


class Reporter:
    """In the process of a run: tells the parent how far it is, at most five times a second."""

    def __init__(self, steps: int) -> None:
        self.steps, self.last = steps, 0.0

    def __call__(self, step: int, loss: float) -> None:
        """``step`` steps are done."""
        now = time.monotonic()
        if now - self.last > PERIOD or step == self.steps:
            self.last = now
            sys.stdout.write(json.dumps({"step": step, "loss": loss}) + "\n")
            sys.stdout.flush()
