// Knows which vectors are called dotprod.
#include "vector_neon.h"
#include "groups_portable.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kDotProd = kernels_called("dotprod");
}
