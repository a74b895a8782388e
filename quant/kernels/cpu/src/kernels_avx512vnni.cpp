// Knows which vectors are called avx512vnni.
#include "vector_avx512.h"
#include "groups_x86.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kAvx512Vnni = kernels_called("avx512vnni");
}
