#include "forward.cuh"

namespace lk::sm90 {

template cudaError_t launch_forward<__half>(const ForwardParams&, int, int, cudaStream_t);

}  // namespace lk::sm90
