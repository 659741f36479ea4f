"""Kills a job at a moment of its own choosing: no clock, the same moments in every run.

`NEXTFLOW_KILLS` sets how many kills a test makes (a few by default).
"""

import os
import signal
import sys
from collections.abc import Callable

import torch

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def num_kills(default: int) -> int:
    return int(os.environ.get("NEXTFLOW_KILLS", default))


def run_and_kill(job: Callable[[], object], inside: str, at: int | None = None) -> int:
    """Runs `job` in a forked process, which dies by SIGKILL before its `at`-th touch of a file below `inside`.

    Returns how often it touched such files, or -1 if it was killed.
    """
    receiver, sender = os.pipe()
    process = os.fork()
    if not process:
        torch.set_num_threads(1)  # a fork has no threads to wait for
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in FILE_EVENTS and str(arguments[0]).startswith(inside):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            job()
            os.write(sender, str(count).encode())
        finally:
            os._exit(1)
    os.close(sender)
    with open(receiver) as told:
        answer = told.read()
    _, status = os.waitpid(process, 0)
    assert answer or os.WIFSIGNALED(status), "the job failed by itself"
    return int(answer) if answer else -1
