// Functions of csrc/core that CUDA kernels call too.
#pragma once

#ifdef __CUDACC__
#define GK_HOST_DEVICE __host__ __device__
#else
#define GK_HOST_DEVICE
#endif
