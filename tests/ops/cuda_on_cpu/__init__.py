"""CUDA kernels on a CPU, for tests: every kernel of `svp_peft.ops.cuda` with its launcher, no GPU.

A kernel's text is made C++ (`emulator.py`): each PTX instruction becomes a call of a function that
`device.h` defines, the rest is plain C++ behind a few macros. g++ builds it, with a call at every
access to memory; the library lies in the user's cache under a hash of all that made it. A thread of
a block is a fiber (`runtime.cpp`), blocks run one after another. `gpu.py` puts this in the place of
NVRTC and the driver, so that everything on the host (choice of kernel, macros, layout of arguments,
grid, shared memory) is the library's own.

What is an error, beside wrong results
    races        two accesses of one address, one of them a write, by two threads with no barrier
                 between them, in shared memory and in tensors; `memory.h` knows that from the
                 barriers alone, whatever the order in which the threads ran. Only __syncthreads and
                 __syncwarp order memory: a shuffle or a product of the tensor cores does not
    addresses    outside of the tensors that the launch was given and of its shared memory, outside
                 of an array, or not aligned
    barriers     a warp that is split at a shuffle, __syncwarp or product
    launches     more threads than __launch_bounds__, an impossible grid
What turns results into NaN or nonsense
    memory       shared memory that was not written in this block, and the destination of an
                 asynchronous copy until the thread that issued it has waited for it
    variables    that were not written
    lockstep     lanes run one by one, each as far as it gets, in one of three orders

What it cannot see: time, registers and occupancy; the last bits (ex2, lg2 and rcp are exact to
float32 here, a tensor core's sum is exact, nothing is contracted to a multiply-add that does not
say so); an access outside of a view but inside of its tensor; graphs, streams, several devices.

A test of a new kernel takes the fixture `gpu` and calls the launcher with CPU tensors. Where an
instruction is not emulated yet, the compiler names the function that `device.h` lacks (`ptx_...`).
"""
