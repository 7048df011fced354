// The backward kernels for emulator.cpp.
#include "wgmma.h"

#include "../../../../csrc/cuda/sm90/backward_bf16.cu"
#include "../../../../csrc/cuda/sm90/backward_fp16.cu"
