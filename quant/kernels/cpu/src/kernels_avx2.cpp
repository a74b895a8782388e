// Knows which vectors are called avx2.
#include "vector_avx2.h"
#include "groups_x86.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kAvx2 = kernels_called("avx2");
}
