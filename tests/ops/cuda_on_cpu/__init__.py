"""CUDA kernels on a CPU, for tests: every kernel of `svp_peft.ops.cuda` with its launcher, no GPU.

A kernel's text is made C++ (`emulator.py`): each PTX instruction becomes a call of a function that
`runtime.h` defines, the rest is plain C++ behind a few macros. g++ builds it once; the library lies
in the user's cache under a hash of all that made it. A thread of a block is a fiber, blocks run one
after another. `gpu.py` puts this in the place of NVRTC and the driver, so that everything on the
host (choice of kernel, macros, layout of arguments, grid, shared memory) is the library's own.

What is checked beside the results
    shared memory      NaN at the start of every block
    cp.async           its destination is NaN until the thread that issued it has waited for it
    addresses          alignment of every access and copy, indices of arrays, writes behind dynamic
                       shared memory
    local variables    hold a pattern until they are written
    barriers           a warp that is split at a shuffle, __syncwarp or mma is an error. Lanes run
                       as far as they get, one by one, in one of three orders: what relies on
                       lockstep or on a missing barrier reads stale numbers in one of them

What it cannot see: time, registers and occupancy; a race that none of the three orders shows; the
last bits (ex2, lg2 and rcp are exact to float32 here, products of a tensor core are summed exactly,
and nothing is contracted to a multiply-add that does not say so); graphs, streams, several devices.
"""
