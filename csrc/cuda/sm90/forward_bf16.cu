#include "forward.cuh"

namespace lk::sm90 {

template cudaError_t launch_forward<__nv_bfloat16>(const ForwardParams&, Tiling, int, cudaStream_t);

}  // namespace lk::sm90
