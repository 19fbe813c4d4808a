"""Memory is used again, but never while somebody still looks at it."""

import gc
import threading

import torch

from peagle.train.buffers import Buffers


def test_memory_comes_back_when_its_last_tensor_is_gone():
    buffers = Buffers()
    whole = buffers.take(1000)
    place, view = whole.data_ptr(), whole.view(torch.bfloat16)[10:20].view(2, 5)
    del whole
    assert buffers.take(1000).data_ptr() != place  # the view still needs it
    del view
    assert place in {buffers.take(1000).data_ptr() for _ in range(2)}


def test_memory_that_autograd_needs_is_not_handed_out():
    buffers = Buffers()
    states = buffers.take(400).view(torch.float32)
    states.copy_(torch.arange(100))
    weight = torch.ones(100, requires_grad=True)
    product = states * weight
    del states
    others = [buffers.take(400).fill_(255) for _ in range(3)]
    product.sum().backward()
    assert weight.grad.tolist() == list(range(100)) and len(others) == 3


def test_any_size_can_be_had_and_small_ones_use_large_memory_again():
    buffers = Buffers()
    large = buffers.take(5000)
    place = large.data_ptr()
    del large
    small = buffers.take(70)
    assert len(small) == 70 and small.data_ptr() == place
    del small
    assert len(buffers.take(9000)) == 9000


def test_threads_never_share_memory():
    buffers, problems = Buffers(), []

    def use(number):
        for _ in range(300):
            memory = buffers.take(4096).fill_(number)
            if not bool((memory == number).all()):
                problems.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not problems
    assert 1 <= len(buffers.free) <= 8  # one in hand and one being asked for, each
