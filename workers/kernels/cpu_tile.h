// The inner product at the heart of everything: a few rows of x times one panel of a packed matrix.
//
// A packed matrix is a sequence of panels of 32 columns, so that a panel is read front to back exactly once:
//   fp32  [N/32][K][32]
//   bf16  [N/32][K/2][32][2]: two successive k side by side in 32 bits, which is what AMX tiles want; without AMX a
//         shift and a mask turn the pair into two fp32 vectors.
// Columns are padded with zeros to a multiple of 32, and K of bf16 too. Sums are fp32.
// Knows nothing of threads, epilogues or where x comes from.
#pragma once

#include "cpu_vector.h"

namespace wg {

constexpr int PANEL = 32;                        // columns of a panel
constexpr int FULL_NV = PANEL / VL;              // vectors across a panel
constexpr int MAX_MR = NUM_REGS == 32 ? 12 : 4;  // most rows of a tile
constexpr int NARROW_NV = VL == 16 ? 1 : 2;      // vectors across a tile of many rows on a narrow machine
// Bytes ahead of the read that are prefetched; measured best of 0 to 4608 at 1 to 8 rows on a Cascade Lake.
#ifndef WG_PREFETCH
#define WG_PREFETCH 4608
#endif
constexpr int PREFETCH = WG_PREFETCH;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Widest tile (in vectors) that keeps MR rows of sums in registers, leaving some for the operands.
constexpr int tile_nv(int mr) {
  return mr * FULL_NV <= NUM_REGS - 7 ? FULL_NV : FULL_NV > 2 && mr * 4 <= NUM_REGS - 7 && FULL_NV >= 4 ? 4 : 2;
}

struct Fp32Panel {
  using X = float;        // element of x
  using Element = float;  // element of the panel
  static constexpr int K_STEP = 1;
  static int64_t padded_k(int64_t k) { return k; }

  template <int MR, int NV>
  static inline __attribute__((always_inline)) void multiply(const X* x, int64_t ldx, const Element* w, int64_t K,
                                                             vf (&acc)[MR][NV]) {
    for (int64_t k = 0; k < K; k++, w += PANEL) {
      vf column[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) column[j] = load(w + j * VL);
#pragma GCC unroll 2
      for (int j = 0; j < NV * VL; j += 16) __builtin_prefetch(reinterpret_cast<const char*>(w + j) + PREFETCH);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        const float value = x[m * ldx + k];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) acc[m][j] += column[j] * value;
      }
    }
  }
};

struct Bf16Panel {
  using X = float;
  using Element = uint32_t;
  static constexpr int K_STEP = 2;
  static int64_t padded_k(int64_t k) { return round_up(k, 32); }

  template <int MR, int NV>
  static inline __attribute__((always_inline)) void multiply(const X* x, int64_t ldx, const Element* w, int64_t K,
                                                             vf (&acc)[MR][NV]) {
    constexpr bool SPLIT = MR * NV <= 8;  // few sums: keep odd k apart, so that additions do not wait for each other
    vf odd_acc[SPLIT ? MR : 1][NV] = {};
    for (int64_t k = 0; k < K; k += 2, w += PANEL) {
      vf even[NV], odd[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        const vu pair = *reinterpret_cast<const vu_unaligned*>(w + j * VL);
        even[j] = (vf)(pair << 16);
        odd[j] = (vf)(pair & 0xffff0000u);
      }
#pragma GCC unroll 2
      for (int j = 0; j < NV * VL; j += 16) __builtin_prefetch(reinterpret_cast<const char*>(w + j) + PREFETCH);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        const float value = x[m * ldx + k];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) acc[m][j] += even[j] * value;
      }
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        const float value = x[m * ldx + k + 1];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) (SPLIT ? odd_acc[m] : acc[m])[j] += odd[j] * value;
      }
    }
    if (SPLIT)
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) acc[m][j] += odd_acc[m][j];
  }
};

}  // namespace wg
