"""The harness itself: a green test on one rank, or one that cannot fail, would prove nothing."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist
from accelerate import PartialState
from ranks import run_on_ranks

pytestmark = pytest.mark.distributed


def test_results_come_in_order_of_ranks_and_children_really_are_ranks():
    def rank(offset):
        state = PartialState(cpu=True)
        assert dist.get_world_size() == state.num_processes
        return offset + state.process_index

    PartialState(cpu=True)  # the parent's own state must not be inherited
    assert run_on_ranks(rank, 10, world=2) == [10, 11]
    assert "RANK" not in os.environ


def test_an_exception_on_one_rank_fails_with_its_traceback():
    def rank():
        if os.environ["RANK"] == "1":
            raise KeyError("the culprit")
        time.sleep(30)

    with pytest.raises(pytest.fail.Exception, match="KeyError: 'the culprit'"):
        run_on_ranks(rank)


def test_ranks_that_hang_are_killed_and_say_where():
    def rank():
        time.sleep(30)

    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"2 ranks did not end within 1 s(.|\n)*test_ranks\.py"):
        run_on_ranks(rank, timeout=1)
    assert time.monotonic() - begin < 5
