// Knows which instruction sets this processor has, and whose kernels are used.
#pragma once

#include "types.h"

namespace moecli {

// The kernels called so; null where this build or this processor lacks them.
const Kernels* find_kernels(const char* name);
// The fastest that this processor has.
const Kernels* best_kernels();
// Name number `index` of all that this processor has, fastest first; null behind the last.
const char* kernels_name(int index);

}  // namespace moecli
