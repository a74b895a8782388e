// Knows which vectors are called neon.
#include "vector_neon.h"
#include "groups_portable.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kNeon = kernels_called("neon");
}
