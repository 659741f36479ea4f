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


def test_a_deprecation_that_is_logged_is_an_error():
    with pytest.raises(DeprecationWarning, match="old_name"):
        logging.get_logger("transformers.somewhere").warning("`old_name` is deprecated")


def hang_for_ever():
    threading.Event().wait()


def test_a_fork_that_hangs_is_killed_and_says_where(monkeypatch, tmp_path):
    monkeypatch.setattr(forks, "patience", 1.0)
    assert forks.wait(forks.fork(hang_for_ever, tmp_path / "log")) == [-signal.SIGKILL]
    assert "in hang_for_ever" in (tmp_path / "log").read_text()


def test_a_fork_that_dies_with_the_lock_of_progress_bars_keeps_it_from_nobody():
    def die():
        tqdm.get_lock().acquire()
        os._exit(3)

    tqdm.get_lock()  # before the fork, so that it would be shared
    assert forks.wait(forks.fork(die)) == [3]
    assert all(lock.acquire(timeout=10) for lock in tqdm.get_lock().locks)
    tqdm.get_lock().release()
