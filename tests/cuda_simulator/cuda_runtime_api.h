// The part of CUDA's host interface that csrc uses, for the simulator: nothing fails, and a stream is nothing.
#pragma once

#define CUDART_VERSION 0

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "not supported";
}
