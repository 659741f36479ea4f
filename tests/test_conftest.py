"""What every test relies on: one thread, and deprecated calls are errors."""

import os
import warnings

import pytest
import torch
from transformers.utils import logging


def test_a_worker_has_one_thread_and_so_have_its_subprocesses():
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_deprecated_call_is_an_error(category):
    with pytest.raises(category, match="old_name"):
        warnings.warn("`old_name` is deprecated", category, stacklevel=1)


def test_a_deprecation_that_is_logged_is_an_error():
    with pytest.raises(DeprecationWarning, match="old_name"):
        logging.get_logger("transformers.somewhere").warning("`old_name` is deprecated")
