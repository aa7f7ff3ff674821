"""What a card takes beside the arrays and temporaries of XLA's buffer assignment.

The rest of a block   XLA's allocator (BFC) hands a free block out whole where it is less than twice what was asked for
                      and no more than 128 MiB of it would be left; what is left then counts as used. A program's
                      temporaries are one block, made anew at each call from what other programs freed: they come with
                      up to so much. Source: xla/tsl/framework/bfc_allocator.cc, kMaxInternalFragmentation. On an H200
                      four runs took 0.11 to 0.22 GB more than was planned on it without this (results/nvidia-h200).
cuBLAS's workspace    32 MiB from Hopper on, 4 MiB before, a temporary of whatever product takes cuBLAS. A program that
                      is compiled on the card counts it itself; where the card is not here, products are not tuned and
                      XLA takes its own kernels, so it is added. Source: xla/service/gpu/transforms/gemm_rewriter.cc.

Not in it, for it is no part of what the allocator counts: CUDA's context, loaded programs, captured graphs.
"""

from qlora_jax.planning.gpus import PlannedGpu

LARGEST_REST = 2**27
WORKSPACE, WORKSPACE_FROM_HOPPER = 2**22, 2**25


def allocator_bytes(gpu: PlannedGpu, temporaries: int) -> int:
    """What a program with so many bytes of temporaries takes beside them at most."""
    major = gpu.compute_capability[0]
    if major == 0:  # a CPU
        return 0
    return rest_of_a_block(temporaries) + (0 if gpu.is_here else _workspace(major))


def rest_of_a_block(size: int) -> int:
    """Bytes at most of a block's end that nobody else gets."""
    return min(size, LARGEST_REST)


def _workspace(major: int) -> int:
    return WORKSPACE_FROM_HOPPER if major >= 9 else WORKSPACE
