#include "backward.cuh"

namespace lk::sm90 {

template cudaError_t launch_backward<__half>(const BackwardParams&, Tiling, int, cudaStream_t);

}  // namespace lk::sm90
