"""Which models of others work: every family on `cp` and on `tp`, all ranks in one process, against the plain model.

    python benchmarks/coverage [NAME ...] [--jobs 2] [--again] [--seconds 300]

NAME: a model type, a kind (decoder, encoder, ...) or both, as decoder/llama; without one, all. Each model runs in a
process of its own. What was measured is a line of measured.jsonl, with the commit at which it was, and is not measured
again without --again. docs/coverage.md is written from all the lines there are. All of it takes hours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import families
import measure
import packages
import page

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "measured.jsonl"
PAGE = ROOT / "docs" / "coverage.md"


class Job(NamedTuple):
    """A model that is being measured."""

    process: BaseProcess
    result: Connection
    since: float
    names: tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what there are results of, too")
    parser.add_argument("--seconds", type=float, default=300, help="the most that one model may take")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    found = known()
    if not given.page:
        chosen = [names for names in everything() if not given.names or {*names, "/".join(names)} & {*given.names}]
        if not chosen:
            sys.exit(f"no model is called {' or '.join(given.names)}")
        run([names for names in chosen if given.again or names not in found], given.jobs, given.seconds, found)
    PAGE.write_text(page.text(list(found.values()), len(everything())))


def everything() -> list[tuple[str, str]]:
    """(kind, name) of all models; kinds take turns, so that a run that is stopped has seen some of each."""
    kinds: dict[str, deque[str]] = {}
    for kind, name in [*families.model_types(), *packages.models()]:
        kinds.setdefault(kind, deque()).append(name)
    order = []
    while kinds:
        order += [(kind, names.popleft()) for kind, names in kinds.items()]
        kinds = {kind: names for kind, names in kinds.items() if names}
    return order


def known() -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured, by (kind, name), in their order."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(one["kind"], one["name"]): one for one in lines}


def keep(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Write all lines, sorted, so that a run that is stopped loses one model at most."""
    RESULTS.write_text("".join(json.dumps(found[names]) + "\n" for names in sorted(found)))


def commit() -> str:
    """The commit that is measured, with a + where files have changed since."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def run(
    waiting: list[tuple[str, str]], jobs: int, seconds: float, known: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Measure models, some at a time, into `known`. One that crashes or takes too long is a result too."""
    at = commit()
    fork = multiprocessing.get_context("fork")  # torch and transformers are imported once
    queue, running = deque(waiting), list[Job]()
    while queue or running:
        while queue and len(running) < jobs:
            names = queue.popleft()
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=measure.into, args=(sender, *names))
            process.start()
            sender.close()
            running.append(Job(process, receiver, time.monotonic(), names))
        for job in [job for job in running if ended(job, seconds)]:
            running.remove(job)
            found = result_of(job, seconds)
            known[job.names] = found | {"commit": at}
            keep(known)
            print(f"{time.monotonic() - job.since:5.0f} s  {page.line(found)}", flush=True)
        time.sleep(0.1)


def ended(job: Job, seconds: float) -> bool:
    return job.result.poll() or not job.process.is_alive() or time.monotonic() - job.since > seconds


def result_of(job: Job, seconds: float) -> dict[str, Any]:
    kind, name = job.names
    try:
        if job.result.poll():
            found: dict[str, Any] = job.result.recv()
            return found
        why = f"took more than {seconds:.0f} s" if job.process.is_alive() else "the process ended"
        return {"kind": kind, "name": name, "unable": why, "meshes": {}}
    except EOFError:
        return {"kind": kind, "name": name, "unable": "the process ended", "meshes": {}}
    finally:
        job.process.kill()
        job.process.join()


if __name__ == "__main__":
    main()
