// Knows which vectors are called portable.
#include "vector_portable.h"
#include "groups_portable.h"
#include "kernels.h"

namespace moecli {
extern const Kernels kPortable = kernels_called("portable");
}
