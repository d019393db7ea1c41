"""Loading: which errors mean exhausted memory, and which tensors are finite."""

from __future__ import annotations

import errno

import pytest
import torch

from core.errors import StudioError
from models import loading

MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GiB, max allowed: 18.1 GiB)"),
    RuntimeError("Invalid buffer size: 24.51 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than 8 bytes."),
    RuntimeError("[malloc] Unable to allocate 9 bytes."),
)
OTHERS = (
    RuntimeError("The allocator was configured twice"),
    RuntimeError("expected a contiguous allocation"),
    ValueError("not enough memory of this song"),
    RuntimeError("size mismatch for memory_embedding.weight"),
    OSError(errno.ENOENT, "No such file"),
)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_every_allocators_failure_is_out_of_memory(error):
    with (
        pytest.raises(StudioError) as raised,
        loading.out_of_memory_as(StudioError("cache-read-only")),
    ):
        raise error
    assert raised.value.code == "cache-read-only"
    with pytest.raises(type(error)), loading.load_errors(_fail, "a"):
        raise error


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_other_errors_are_not_taken_for_it(error):
    with (
        pytest.raises(type(error)) as raised,
        loading.out_of_memory_as(StudioError("cache-read-only")),
    ):
        raise error
    assert raised.value is error
    with pytest.raises(StudioError, match="a does not load"), loading.load_errors(_fail, "a"):
        raise error


def test_an_allocation_that_no_computer_can_make_is_out_of_memory():
    with pytest.raises(StudioError), loading.out_of_memory_as(StudioError("cache-read-only")):
        torch.empty(1 << 60, dtype=torch.uint8)


def _fail(file: str, problem: str) -> StudioError:
    return StudioError("model-broken", model="m", file=file, problem=problem, fix="f")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 517, 999])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, bad, at):
    x = torch.linspace(-3, 3, 1000, dtype=dtype).view(10, 10, 10)
    assert loading.is_finite(x)
    x.view(-1)[at] = bad
    assert not loading.is_finite(x)


def test_the_largest_numbers_of_a_type_and_no_numbers_at_all_are_finite():
    assert loading.is_finite(
        torch.full((3,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    )
    assert loading.is_finite(torch.empty(0))


def test_the_cache_goes_by_the_name_that_transformers_gives_it():
    class Older:
        def forward(self, past_key_values=None, **others): ...

    class Newer:
        def forward(self, cache=None, use_cache=None, **others): ...

    assert loading.cache_argument(Older()) == "past_key_values"
    assert loading.cache_argument(Newer()) == "cache"
