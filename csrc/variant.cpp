// The table of one variant's kernels.
#include "kernels.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#define SPIKEDECODER_STRING_(name) #name
#define SPIKEDECODER_STRING(name) SPIKEDECODER_STRING_(name)

const Kernels kernels = {
    SPIKEDECODER_STRING(SPIKEDECODER_VARIANT),
#define X(function, Arguments) function,
    SPIKEDECODER_KERNELS(X)
#undef X
};

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
