// Knows which instruction sets this processor has; see isa.h.
#include "isa.h"

#include <cstring>

#if defined(MOECLI_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(MOECLI_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace moecli {

extern const Kernels kPortable;
#ifdef MOECLI_X86
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni;  // as far as the compiler knows them
#elif defined(MOECLI_ARM64)
extern const Kernels kNeon, kDotProd;
#endif

#ifdef MOECLI_X86
const bool kFetchIntoSecond = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
const bool kFetchIntoSecond = false;
#endif

namespace {

struct Variant {
  const Kernels* kernels;
  bool (*runs)();
};

#ifdef MOECLI_X86
// Not every compiler knows the name f16c; whatever has AVX2 has that.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Compilers of 2022 do not know this name yet: leaf 7, sub-leaf 1, bit 4 of EAX.
bool has_avxvnni() {
  unsigned a = 7, b = 0, c = 1, d = 0;
  asm volatile("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  return has_avx2() && (a >> 4 & 1);
}

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(MOECLI_ARM64)
bool has_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kAsimdDp;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) && has;
#else
  return false;
#endif
}
#endif

const Variant kVariants[] = {
#ifdef MOECLI_X86
#ifndef MOECLI_WITHOUT_AVX512VNNI
    {&kAvx512Vnni, has_avx512vnni},
#endif
#ifndef MOECLI_WITHOUT_AVXVNNI
    {&kAvxVnni, has_avxvnni},
#endif
#ifndef MOECLI_WITHOUT_AVX2
    {&kAvx2, has_avx2},
#endif
#elif defined(MOECLI_ARM64)
#ifndef MOECLI_WITHOUT_DOTPROD
    {&kDotProd, has_dotprod},
#endif
    {&kNeon, [] { return true; }},
#endif
    {&kPortable, [] { return true; }},
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Variant& variant : kVariants) {
    if (!std::strcmp(variant.kernels->name, name)) {
      return variant.runs() ? variant.kernels : nullptr;
    }
  }
  return nullptr;
}

const char* kernels_name(int index) {
  for (const Variant& variant : kVariants) {
    if (variant.runs() && index-- == 0) return variant.kernels->name;
  }
  return nullptr;
}

const Kernels* best_kernels() { return find_kernels(kernels_name(0)); }

}  // namespace moecli
