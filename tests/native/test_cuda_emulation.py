"""The emulation of CUDA that the kernels' tests stand on: that it does what a GPU does, and refuses what a GPU leaves
undefined."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from cuda_kernels import build_emulated

SUCCESS, INVALID_CONFIGURATION, LAUNCH_FAILURE = 0, 9, 719
SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What each thread knows of itself, and gets from the others.
__global__ void identities(int* out) {
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z), lane = thread % warpSize;
    const int block = blockIdx.x + gridDim.x * blockIdx.y;
    int* to = out + 7 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
    to[0] = block;
    to[1] = thread;
    to[2] = __shfl_xor_sync(0xffffffffu, 100 + lane, 5);
    to[3] = __shfl_down_sync(0xffffffffu, 100 + lane, 30);
    to[4] = __shfl_sync(0xffffffffu, 100 + lane, 7);
    to[5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    to[6] = __any_sync(0xffffffffu, lane == 40);
}

// Shifts by one through shared memory; without the barrier it reads what may not have been written yet.
__global__ void shift(int* values, bool waits) {
    __shared__ int shared[64];
    shared[threadIdx.x] = values[threadIdx.x];
    if (waits) __syncthreads();
    values[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

__global__ void misuse(int kind) {
    const unsigned lane = threadIdx.x % 32;
    if (kind == 0 && threadIdx.x < 40) return;
    if (kind == 0) __syncthreads();
    if (kind == 1 && lane < 16) __syncthreads();
    if (kind == 1) __syncwarp();
    if (kind == 2) __shfl_xor_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, 1, 1);
    if (kind == 3) __shfl_xor_sync(0xfffeu, 1, 1);
    if (kind == 4 && lane == 3) return;
    if (kind == 4) __shfl_xor_sync(0xffffffffu, 1, 1);
    if (kind == 5 && lane < 8) __shfl_sync(0xffffffffu, 1, 1);
    if (kind == 5) __shfl_down_sync(0xffffffffu, 1, 1);
}

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

EXPORT int run_identities(int* out) { return launch(identities, dim3(2, 3), dim3(8, 4, 2), out); }
EXPORT int run_shift(int* values, bool waits) { return launch(shift, 1, 64, values, waits); }
EXPORT int run_misuse(int kind) { return launch(misuse, 1, 64, kind); }
EXPORT int run_size(unsigned blocks, unsigned threads) { return launch(misuse, dim3(1, blocks), threads, -1); }
EXPORT void to_half(const float* from, uint16_t* to, int n) {
    for (int i = 0; i < n; ++i) to[i] = __float2half_rn(from[i]).bits;
}
EXPORT void from_half(const uint16_t* from, float* to, int n) {
    for (int i = 0; i < n; ++i) to[i] = __half2float({from[i]});
}
EXPORT void to_bfloat16(const float* from, uint16_t* to, int n) {
    for (int i = 0; i < n; ++i) to[i] = __float2bfloat16_rn(from[i]).bits;
}
EXPORT void from_bfloat16(const uint16_t* from, float* to, int n) {
    for (int i = 0; i < n; ++i) to[i] = __bfloat162float({from[i]});
}
"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "trial.cu").write_text(SOURCE)
    return ctypes.CDLL(str(build_emulated(folder / "trial.so", folder / "trial.cu")))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_threads_know_their_place_and_get_what_the_others_give(emulation: ctypes.CDLL, order: int) -> None:
    emulation.cuda_emulation_order(order)
    out = np.zeros((6, 64, 7), np.int32)
    assert emulation.run_identities(pointer(out)) == SUCCESS
    lane = np.arange(64) % 32
    for block in range(6):
        assert (out[block, :, 0] == block).all()
        assert (out[block, :, 1] == np.arange(64)).all()
        assert (out[block, :, 2] == 100 + (lane ^ 5)).all()
        assert (out[block, :, 3] == 100 + np.where(lane + 30 < 32, lane + 30, lane)).all()
        assert (out[block, :, 4] == 107).all()
        assert (out[block, :, 5].view(np.uint32) == sum(1 << i for i in range(0, 32, 3))).all()
        assert not out[block, :, 6].any()


def test_a_missing_barrier_shows_in_some_order(emulation: ctypes.CDLL) -> None:
    is_right = {}
    for waits in (True, False):
        for order in (0, 1, 2):
            emulation.cuda_emulation_order(order)
            values = np.arange(64, dtype=np.int32) + 100 * order + 1000 * waits  # not what is left of the last launch
            given = values.copy()
            assert emulation.run_shift(pointer(given), waits) == SUCCESS
            is_right[waits, order] = (given == np.roll(values, -1)).all()
    assert all(is_right[True, order] for order in (0, 1, 2))
    assert not all(is_right[False, order] for order in (0, 1, 2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "__syncthreads: a thread of the block has returned"),
        (1, "wait at a barrier or shuffle that others never reach"),
        (2, "have another mask|have returned"),
        (3, "a lane is not in its own mask"),
        (4, "returned"),
        (5, "other lanes of the warp are at"),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_what_hardware_leaves_undefined_fails(
    emulation: ctypes.CDLL, order: int, kind: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    emulation.cuda_emulation_order(order)
    assert emulation.run_misuse(kind) == LAUNCH_FAILURE
    assert re.search(message, capfd.readouterr().err)
    assert emulation.run_misuse(-1) == SUCCESS  # the next launch is not affected


def test_a_launch_that_no_device_takes_is_refused(emulation: ctypes.CDLL) -> None:
    for blocks, threads in ((1, 0), (1, 1025), (0, 32), (65536, 32)):
        assert emulation.run_size(blocks, threads) == INVALID_CONFIGURATION
    assert emulation.run_size(2, 1024) == SUCCESS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_as_torch_does(emulation: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    values = torch.empty(1 << 16)
    getattr(emulation, f"from_{name}")(pointer(bits.numpy()), pointer(values.numpy()), len(bits))
    torch.testing.assert_close(values, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    # Every value and its neighbours in float32, what lies in the middle of two, and floats at large.
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(1))
    around = torch.cat([values.view(torch.int32) + step for step in (-1, 0, 1)])
    half_way = (values[:-1].double() + values[1:].double()).div(2).float().view(torch.int32)
    floats = torch.cat([around, half_way, half_way + 1, half_way - 1, random.to(torch.int32)]).view(torch.float32)
    rounded = torch.empty(len(floats), dtype=torch.uint16)
    getattr(emulation, f"to_{name}")(pointer(floats.numpy()), pointer(rounded.numpy()), len(floats))
    actual, wanted = rounded.view(dtype), floats.to(dtype)
    assert (actual.isnan() == wanted.isnan()).all()
    is_number = ~wanted.isnan()
    assert torch.equal(actual.view(torch.int16)[is_number], wanted.view(torch.int16)[is_number])
