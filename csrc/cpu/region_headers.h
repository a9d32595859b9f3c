// What a kernel file includes before its instruction-set region (foreach_isa.h) so that the headers of csrc/cpu can be
// used inside it.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/philox.h"
#include "core/switch.h"
