"""What every test relies on: one thread, deprecated calls are errors, and nothing hangs for ever."""

import os
import signal
import threading
import warnings

import pytest
import torch
from tqdm import tqdm
from transformers.utils import logging

import forks


def test_a_worker_has_one_thread_and_so_have_its_subprocesses():
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_deprecated_call_is_an_error(category):
    with pytest.raises(category, match="old_name"):
        warnings.warn("`old_name` is deprecated", category, stacklevel=1)


@pytest.fixture(scope="module")
def silence():
    logging.set_verbosity_error()


def test_a_deprecation_that_is_logged_is_an_error(silence):
    with pytest.raises(DeprecationWarning, match="old_name"):
        logging.get_logger("transformers.somewhere").warning("`old_name` is deprecated")


def test_forks_that_hang_are_killed_and_say_where(monkeypatch, tmp_path):
    def hang_for_ever():
        os.write(ready, b"!")
        threading.Event().wait()

    begun, ready = os.pipe()
    hanging = forks.fork(hang_for_ever, tmp_path / "log")
    ended = forks.fork(lambda: None)
    os.read(begun, 1)
    monkeypatch.setattr(forks, "patience", 1.0)
    assert forks.wait(hanging, ended) == [-signal.SIGKILL, 0]
    assert "in hang_for_ever" in (tmp_path / "log").read_text()


def test_forks_end_with_the_test_that_waits_for_them(monkeypatch):
    hanging, clock = forks.fork(threading.Event().wait), iter([0.0])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(forks.time, "monotonic", lambda: next(clock))  # the second look at the clock is interrupted
        forks.wait(hanging)
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)


def test_a_fork_that_dies_with_the_lock_of_progress_bars_keeps_it_from_nobody():
    def die():
        tqdm.get_lock().acquire()
        os._exit(3)

    tqdm.get_lock()  # before the fork, so that it would be shared
    assert forks.wait(forks.fork(die)) == [3]
    assert all(lock.acquire(timeout=10) for lock in tqdm.get_lock().locks)
    tqdm.get_lock().release()
