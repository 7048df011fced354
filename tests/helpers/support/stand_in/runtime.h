// The host side of csrc/cuda/sm90 as it is, with kernels that are compiled for the host and never run. sm90_machine
// gives them their instructions; its own launch gets another name, so that the launch of launch.cuh stays.
#pragma once

#include "../../../../csrc/cuda/sm90/launch.cuh"

#define launch emulated_launch
#include "../sm90_machine/wgmma.h"
#undef launch
