// The types in the declaration of a CUDA launcher, `cudaError_t launch_<kernel>(const Params&, cudaStream_t)`: without
// CUDA in the build a room's header still declares it, and nothing calls it.
#pragma once

#ifdef GENAI_KERNELS_CUDA
#include <cuda_runtime_api.h>
#else
using cudaError_t = int;
using cudaStream_t = void*;
#endif
