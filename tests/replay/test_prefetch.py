"""A batch made in the background is the batch made in the foreground."""

from __future__ import annotations

import threading

import pytest
import torch

from mpdqn.dqn.prioritization import Prioritization
from mpdqn.replay import Prefetcher
from tests.replay.test_shards import assert_equal, make

CPU = torch.device("cpu")


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("prioritization", [None, Prioritization(beta_updates=5)])
def test_a_prefetched_batch_is_the_direct_one(prioritization):
    direct, ahead = make(prioritization=prioritization), make(prioritization=prioritization)
    generator = torch.Generator().manual_seed(0)
    with Prefetcher(CPU, torch.float64) as prefetcher:
        draw = ahead.draw(16, 0)
        for update in range(6):
            # What the trainer does meanwhile: the errors of the batch before come back to the same shards.
            prefetcher.start(lambda draw=draw: ahead.gather(draw))
            batch = direct.sample(16, update).to(CPU, torch.float64)
            errors = torch.randn(16, generator=generator)
            ahead.return_td_errors(draw.index, errors)
            direct.return_td_errors(batch.index, errors)
            fetched = prefetcher.result()
            assert_equal(fetched, batch)
            assert fetched.reward.dtype == torch.float64
            again = fetched.to(CPU, torch.float64)
            assert again.obs is fetched.obs
            assert again.weight is fetched.weight
            draw = ahead.draw(16, update + 1)


def test_an_error_in_the_thread_is_raised_at_the_result_and_the_next_batch_comes():
    shards = make()

    def fail():
        raise ZeroDivisionError("in the thread")

    with Prefetcher(CPU, torch.float32) as prefetcher:
        prefetcher.start(fail)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            prefetcher.result()
        prefetcher.start(lambda: shards.sample(16, 0))
        assert_equal(prefetcher.result(), shards.sample(16, 0))


def test_close_leaves_no_thread_even_with_a_batch_under_way():
    begun, go_on = threading.Event(), threading.Event()
    shards = make()

    def slow():
        begun.set()
        go_on.wait(10)
        return shards.sample(16, 0)

    prefetcher = Prefetcher(CPU, torch.float32)
    assert prefetch_threads() == []
    prefetcher.start(slow)
    assert begun.wait(10)
    assert len(prefetch_threads()) == 1
    go_on.set()
    prefetcher.close()
    assert prefetch_threads() == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        prefetcher.start(slow)


def test_one_batch_at_a_time():
    shards = make()
    with Prefetcher(CPU, torch.float32) as prefetcher:
        with pytest.raises(RuntimeError, match=r"start\(\) one first"):
            prefetcher.result()
        prefetcher.start(lambda: shards.sample(16, 0))
        with pytest.raises(RuntimeError, match=r"fetch it with result\(\)"):
            prefetcher.start(lambda: shards.sample(16, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_direct_one_too():
    device = torch.device("cuda")
    shards = make(prioritization=Prioritization())
    with Prefetcher(device, torch.float32) as prefetcher:
        for update in range(20):
            prefetcher.start(lambda update=update: shards.sample(16, update))
            fetched = prefetcher.result()
            assert fetched.obs.is_cuda
            assert fetched.obs.dtype == torch.uint8
            assert_equal(fetched.to(CPU, torch.float32), shards.sample(16, update))
