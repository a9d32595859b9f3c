// Tiles of 16-bit elements in shared memory, as TMA writes them and wgmma reads them, and rings of them.
#pragma once
#include "cuda/hopper_ptx.cuh"
#include "cuda/wgmma_ptx.cuh"
#include "core/tensor_box.h"

namespace genai_kernels {

// [kRows][kColumns] elements: boxes of kBox columns one after the other. A row of a box is one line of 128 bytes (of 64
// where the columns are no multiple of 64); the hardware permutes the 16-byte pieces of a line by its address ("swizzle"),
// so that neither a row nor a column of a tile lies in few banks.
template <int kRows, int kColumns>
struct alignas(1024) SharedTile {
  static constexpr int kBox = tensor_box_columns(kColumns), kBoxes = kColumns / kBox;
  static constexpr int kLine = kBox * 2, kBytes = kRows * kColumns * 2;
  static_assert(kRows % 8 == 0 && kColumns % kBox == 0);
  uint16_t elements[kRows * kColumns];

  // One thread: all columns of rows [token, token + kRows) of a head; `full` gets kBytes, which it has been told to expect.
  GK_DEVICE void load(const CUtensorMap* map, uint64_t* full, int token, int head, int batch) {
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) tma_load(elements + b * kRows * kBox, map, full, b * kBox, token, head, batch);
  }
  // Operand of wgmma with k along the columns: rows from `row` on (a multiple of 8), columns [16 k, 16 k + 16).
  GK_DEVICE uint64_t along_columns(int row, int k) const {
    const int column = 16 * k;
    return descriptor(elements + column / kBox * kRows * kBox + row * kBox + column % kBox, 16);
  }
  // Operand of wgmma with k along the rows: rows [16 k, 16 k + 16), columns from 0 on.
  GK_DEVICE uint64_t along_rows(int k) const { return descriptor(elements + 16 * k * kBox, kRows * kLine); }

  // Zeros in the place of NaN and infinities, by `threads` threads of which this is number `thread`. They must meet
  // before the tile is read.
  template <class T>
  GK_DEVICE void clear_nonfinite(int thread, int threads) {
    constexpr uint32_t kExponent = is_same<T, bf16> ? 0x7f80 : 0x7c00;  // all ones there: not finite
    uint4* pieces = reinterpret_cast<uint4*>(elements);
    for (int i = thread; i < kBytes / 16; i += threads) {
      uint4 piece = pieces[i];
      uint32_t changed = 0;
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        uint32_t keep = ~0u;
        if ((*word & kExponent) == kExponent) keep &= 0xffff0000;
        if ((*word >> 16 & kExponent) == kExponent) keep &= 0x0000ffff;
        *word &= keep;
        changed |= ~keep;
      }
      if (changed) pieces[i] = piece;
    }
    shared_fence_async();
  }

 private:
  // `leading`: bytes from one box to the next, for an operand along the rows. Lines come in groups of 8.
  GK_DEVICE static uint64_t descriptor(const uint16_t* at, uint64_t leading) {
    constexpr uint64_t kSwizzle = kLine == 128 ? 1 : 2;
    return uint64_t(shared_address(at) >> 4) | leading >> 4 << 16 | uint64_t(8 * kLine >> 4) << 32 | kSwizzle << 62;
  }
};

// Position in a ring of kStages tiles: which, and the parity of the phase in which it is filled.
template <int kStages>
struct RingPosition {
  int stage = 0, phase = 0;
  GK_DEVICE RingPosition next() const {
    return stage + 1 == kStages ? RingPosition{0, phase ^ 1} : RingPosition{stage + 1, phase};
  }
};

}  // namespace genai_kernels
