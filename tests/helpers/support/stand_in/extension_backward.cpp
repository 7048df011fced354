// The backward kernels for extension.cpp, so that both files compile in parallel.
#include "runtime.h"

#include "../../../../csrc/cuda/sm90/backward_bf16.cu"
#include "../../../../csrc/cuda/sm90/backward_fp16.cu"
