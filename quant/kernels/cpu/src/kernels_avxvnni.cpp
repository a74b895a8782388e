// Knows which vectors are called avxvnni.
#include "vector_avx2.h"
#include "groups_x86.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kAvxVnni = kernels_called("avxvnni");
}
