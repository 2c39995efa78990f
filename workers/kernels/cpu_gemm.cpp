// Linear layers: pack a weight once, then y = x W^T + b for any number of rows.
//
// Up to a dozen rows the cost is reading the weight once, at memory speed. Beyond that rows are cut into tiles that
// pass over a panel while it is in cache. Knows one matrix; knows nothing of models.
//
// M rows of x, N columns of y, K input features.

#include <algorithm>
#include <utility>

#include "cpu_kernels.h"
#include "cpu_parallel.h"
#include "cpu_tile.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define WG_AMX 1
#ifndef WG_AMX_MIN_ROWS
#define WG_AMX_MIN_ROWS 5
#endif
#endif

namespace wg {
namespace {

// Where results go: in the dtype of x, or fp32.
template <class T>
struct Output {
  void* y;
  bool y_is_fp32;
  int64_t ldy;
  const T* bias;  // or null
  int64_t num_columns;

  template <int MR, int WIDTH>
  void put(int64_t m, int64_t n, const vf (&sums)[MR][WIDTH]) const {
    alignas(64) vf copy[MR * WIDTH];  // through memory, so that the loop below need not be unrolled
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int j = 0; j < WIDTH; j++) copy[i * WIDTH + j] = sums[i][j];
    put_rows(m, n, copy, MR, WIDTH);
  }
  __attribute__((noinline)) void put_rows(int64_t m, int64_t n, const vf* sums, int num_rows, int width) const {
    for (int j = 0; j < width && n < num_columns; j++, n += VL) {
      const vf b = bias == nullptr ? vf{} : load_upto(bias + n, num_columns - n);
      if (y_is_fp32)
        put_column(static_cast<float*>(y) + m * ldy + n, num_columns - n, sums + j, num_rows, width, b);
      else
        put_column(static_cast<T*>(y) + m * ldy + n, num_columns - n, sums + j, num_rows, width, b);
    }
  }

 private:
  template <class Y>
  void put_column(Y* to, int64_t left, const vf* sums, int num_rows, int width, vf b) const {
    if (left >= VL)
      for (int i = 0; i < num_rows; i++, to += ldy) store(to, sums[i * width] + b);
    else
      for (int i = 0; i < num_rows; i++, to += ldy) store_part(to, sums[i * width] + b, int(left));
  }
};

// Rows [m, m + MR) times columns [n, n + num_vectors * VL) of a panel.
template <class Kind, class T, int MR>
void tile_rows(const typename Kind::X* x, int64_t ldx, const typename Kind::Element* w, int64_t K, int num_vectors,
               const Output<T>& out, int64_t m, int64_t n) {
  constexpr int NV = tile_nv(MR);
  auto run = [&](auto width, int v) {
    constexpr int WIDTH = decltype(width)::value;
    vf acc[MR][WIDTH] = {};
    Kind::template multiply<MR, WIDTH>(x, ldx, w + v * VL, K, acc);
    out.template put<MR, WIDTH>(m, n + v * VL, acc);
  };
  int v = 0;
  for (; v + NV <= num_vectors; v += NV) run(std::integral_constant<int, NV>{}, v);
  if constexpr (NARROW_NV < NV)
    for (; v < num_vectors; v += NARROW_NV) run(std::integral_constant<int, NARROW_NV>{}, v);
}

template <class Kind, class T>
using TileFn = void (*)(const typename Kind::X*, int64_t, const typename Kind::Element*, int64_t, int, const Output<T>&,
                        int64_t, int64_t);

template <class Kind, class T, int... I>
TileFn<Kind, T> tile_for(int rows, std::integer_sequence<int, I...>) {
  static constexpr TileFn<Kind, T> table[] = {tile_rows<Kind, T, I + 1>...};
  return table[rows - 1];
}

// All rows of a block against one unit of columns: the first tile brings the panel into cache for the others.
template <class Kind, class T>
void rows_by_panel(const typename Kind::X* x, int64_t ldx, int64_t num_rows, const typename Kind::Element* w, int64_t K,
                   int num_vectors, const Output<T>& out, int64_t first_row, int64_t n) {
  const int64_t num_tiles = (num_rows + MAX_MR - 1) / MAX_MR;
  int64_t row = 0;
  for (int64_t t = 0; t < num_tiles; t++) {
    const int rows = int(num_rows / num_tiles + (t < num_rows % num_tiles));
    const auto tile = tile_for<Kind, T>(rows, std::make_integer_sequence<int, MAX_MR>{});
    tile(x + row * ldx, ldx, w, K, num_vectors, out, first_row + row, n);
    row += rows;
  }
}

template <class From, class X>
void convert_row(const From* from, X* to, int64_t K, int64_t padded_k) {
  if constexpr (std::is_same_v<From, X>)
    memcpy(to, from, size_t(K) * sizeof(X));
  else
    for (int64_t k = 0; k < K; k += VL) store_upto(to + k, load_upto(from + k, K - k), K - k);
  memset(to + K, 0, size_t(padded_k - K) * sizeof(X));
}

// Elements between rows of a copy: an odd number of cache lines, so that the rows of a tile do not evict each other.
int64_t spread(int64_t k, size_t element_size) {
  const int64_t line = int64_t(64 / element_size), lines = round_up(k, line) / line;
  return (lines | 1) * line;
}

// Units of work are whole panels, or halves where there are few panels for many threads.
struct Columns {
  int64_t num_units, chunk;
  int unit;  // columns of a unit
  Columns(int64_t N, int threads) {
    const int64_t panels = round_up(N, PANEL) / PANEL;
    unit = panels < 2 * threads ? PANEL / 2 : PANEL;
    num_units = panels * (PANEL / unit);
    chunk = std::max<int64_t>(1, num_units / (threads * 4));
  }
};

template <class Kind, class T>
void linear(const T* x, int64_t ldx, const typename Kind::Element* packed, const Output<T>& out, int64_t M, int64_t N,
            int64_t K, int threads) {
  using X = typename Kind::X;
  static thread_local Scratch scratch;
  const int64_t padded_k = Kind::padded_k(K);
  const bool in_place = std::is_same_v<X, T> && padded_k == K && M <= MAX_MR;
  const int64_t copy_ld = spread(padded_k, sizeof(X));
  const int64_t panel_elements = padded_k / Kind::K_STEP * PANEL;
  const int64_t block = std::max<int64_t>(MAX_MR, 131072 / padded_k / MAX_MR * MAX_MR);  // rows: half a MB of fp32
  X* const copy = in_place ? nullptr : scratch.get<X>(size_t(std::min(block, M) * copy_ld));

  for (int64_t first = 0; first < M; first += block) {
    const int64_t rows = std::min(block, M - first);
    const X* rows_x = reinterpret_cast<const X*>(x + first * ldx);
    int64_t rows_ld = ldx;
    if (!in_place) {
      const int converters = rows * padded_k < 16384 ? 1 : threads;
      parallel_for(rows, 8, converters,
                   [&](int64_t m) { convert_row(x + (first + m) * ldx, copy + m * copy_ld, K, padded_k); });
      rows_x = copy;
      rows_ld = copy_ld;
    }
    const Columns columns(N, threads);
    parallel_for(columns.num_units, columns.chunk, threads, [&](int64_t u) {
      const int64_t n = u * columns.unit;
      rows_by_panel<Kind, T>(rows_x, rows_ld, rows, packed + n / PANEL * panel_elements + n % PANEL, padded_k,
                             columns.unit / VL, out, first, n);
    });
  }
}

#if WG_AMX
// AMX: C (16 rows x 16 columns, fp32) += A (16 x 32 of x) B (32 x 16 of a panel). Tiles 0..3 are C, 4..5 A, 6..7 B.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool amx_permitted() {  // Linux gives a process the tile registers only when it asks
  static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return permitted;
}

// 32 rows (or 16) of x times one panel.
template <int TILES_M>
void amx_tile(const bf16* x, int64_t ldx, const uint32_t* w, int64_t K, bool stream, float (*c)[16][16]) {
  _tile_zero(0);
  _tile_zero(1);
  if (TILES_M == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32, w += 16 * PANEL) {
    if (stream)
#pragma GCC unroll 32
      for (int i = 0; i < 32; i++) __builtin_prefetch(reinterpret_cast<const char*>(w) + PREFETCH + i * 64);
    _tile_loadd(6, w, PANEL * 4);
    _tile_loadd(7, w + 16, PANEL * 4);
    _tile_loadd(4, x + k, ldx * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TILES_M == 2) {
      _tile_loadd(5, x + 16 * ldx + k, ldx * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  if (TILES_M == 2) {
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
  }
}

// Rows for AMX: whole tiles of 32 straight from x, the rest from a copy that is padded to whole tiles (and K to 32).
struct AmxRows {
  const bf16 *x, *tail;
  int64_t ldx, ld_tail, num_rows, num_whole;

  void times_panel(const uint32_t* w, int64_t K, const Output<bf16>& out, int64_t first_row, int64_t n) const {
    alignas(64) float c[4][16][16];
    for (int64_t row = 0; row < num_rows; row += 32) {
      const int64_t left = num_rows - row;
      const bool is_whole = row < num_whole;
      const bf16* const from = is_whole ? x + row * ldx : tail + (row - num_whole) * ld_tail;
      (left > 16 ? amx_tile<2> : amx_tile<1>)(from, is_whole ? ldx : ld_tail, w, K, row == 0, c);
      for (int t = 0; t < (left > 16 ? 4 : 2); t++)
        out.put_rows(first_row + row + t / 2 * 16, n + t % 2 * 16, reinterpret_cast<const vf*>(c[t]),
                     int(std::min<int64_t>(16, left - t / 2 * 16)), 1);
    }
  }
};

void linear_amx(const bf16* x, int64_t ldx, const uint32_t* packed, const Output<bf16>& out, int64_t M, int64_t N,
                int64_t K, int threads) {
  static thread_local Scratch scratch;
  const int64_t padded_k = round_up(K, 32), ld_tail = spread(padded_k, sizeof(bf16));
  const int64_t block = std::max<int64_t>(32, 524288 / padded_k / 32 * 32);  // rows: a MB
  const int64_t num_panels = round_up(N, PANEL) / PANEL;
  bf16* const copy = scratch.get<bf16>(size_t(std::min(block, round_up(M, 32)) * ld_tail));
  for (int64_t first = 0; first < M; first += block) {
    AmxRows rows{x + first * ldx, copy, ldx, ld_tail, std::min(block, M - first), 0};
    if (padded_k == K) rows.num_whole = rows.num_rows / 32 * 32;
    for (int64_t m = rows.num_whole; m < round_up(rows.num_rows, 16); m++)
      convert_row(x + (first + std::min(m, rows.num_rows - 1)) * ldx, copy + (m - rows.num_whole) * ld_tail,
                  m < rows.num_rows ? K : 0, padded_k);
    WorkCounter work(num_panels, std::max<int64_t>(1, num_panels / (threads * 4)));
    run_parallel(threads, [&] {
      static const TileConfig config;
      _tile_loadconfig(&config);
      int64_t begin, end;
      while (work.take(&begin, &end))
        for (int64_t p = begin; p < end; p++)
          rows.times_panel(packed + p * padded_k / 2 * PANEL, padded_k, out, first, p * PANEL);
      _tile_release();
    });
  }
}
#endif

void linear_bf16(const bf16* x, int64_t ldx, const uint32_t* packed, const Output<bf16>& out, int64_t M, int64_t N,
                 int64_t K, int threads) {
#if WG_AMX
  if (M >= WG_AMX_MIN_ROWS && amx_permitted()) return linear_amx(x, ldx, packed, out, M, N, K, threads);
#endif
  linear<Bf16Panel, bf16>(x, ldx, packed, out, M, N, K, threads);
}

// Where element (n, k) of a weight lies in its packed form, in units of K_STEP elements: (panel, k / step, column).
template <class T, int K_STEP>
int64_t packed_index(int64_t n, int64_t k, int64_t padded_k) {
  return (n / PANEL * (padded_k / K_STEP) + k / K_STEP) * PANEL * K_STEP + n % PANEL * K_STEP + k % K_STEP;
}

// packed may be weight itself: a panel is copied (and padded) before it is overwritten. Step is what lies side by side
// in a panel: one fp32, or two bf16.
template <class T, class Step>
void pack(const T* weight, T* packed, int64_t N, int64_t K, int64_t padded_k, int threads) {
  const int64_t ld = spread(padded_k, sizeof(T)), steps = padded_k * int64_t(sizeof(T)) / int64_t(sizeof(Step));
  parallel_for(round_up(N, PANEL) / PANEL, 4, threads, [&](int64_t p) {
    static thread_local Scratch scratch;
    T* const rows = scratch.get<T>(size_t(PANEL * ld));
    memset(rows, 0, size_t(PANEL * ld) * sizeof(T));
    for (int64_t n = 0; n < std::min<int64_t>(PANEL, N - p * PANEL); n++)
      memcpy(rows + n * ld, weight + (p * PANEL + n) * K, size_t(K) * sizeof(T));
    Step* to = reinterpret_cast<Step*>(packed + p * PANEL * padded_k);
    for (int64_t k = 0; k < steps; k++, to += PANEL)
      for (int64_t n = 0; n < PANEL; n++)
        memcpy(to + n, reinterpret_cast<const char*>(rows + n * ld) + k * int64_t(sizeof(Step)), sizeof(Step));
  });
}

template <class T, int K_STEP>
void unpack_rows(const int64_t* rows, const T* packed, T* out, int64_t num_rows, int64_t K, int64_t padded_k,
                 int threads) {
  parallel_for(num_rows, 8, threads, [&](int64_t i) {
    for (int64_t k = 0; k < K; k++) out[i * K + k] = packed[packed_index<T, K_STEP>(rows[i], k, padded_k)];
  });
}

}  // namespace
}  // namespace wg

using wg::bf16;

void wg_pack(const void* weight, void* packed, int64_t N, int64_t K, int is_bf16, int threads) {
  if (is_bf16)
    wg::pack<bf16, uint32_t>(static_cast<const bf16*>(weight), static_cast<bf16*>(packed), N, K,
                             wg::Bf16Panel::padded_k(K), threads);
  else
    wg::pack<float, float>(static_cast<const float*>(weight), static_cast<float*>(packed), N, K, K, threads);
}

void wg_unpack_rows(const int64_t* rows, const void* packed, void* out, int64_t num_rows, int64_t K, int is_bf16,
                    int threads) {
  if (is_bf16)
    wg::unpack_rows<bf16, 2>(rows, static_cast<const bf16*>(packed), static_cast<bf16*>(out), num_rows, K,
                             wg::Bf16Panel::padded_k(K), threads);
  else
    wg::unpack_rows<float, 1>(rows, static_cast<const float*>(packed), static_cast<float*>(out), num_rows, K, K,
                              threads);
}

void wg_linear(const void* x, int64_t ldx, const void* packed, const void* bias, void* y, int y_is_fp32, int64_t M,
               int64_t N, int64_t K, int is_bf16, int threads) {
  if (is_bf16)
    wg::linear_bf16(static_cast<const bf16*>(x), ldx, static_cast<const uint32_t*>(packed),
                    {y, y_is_fp32 != 0, N, static_cast<const bf16*>(bias), N}, M, N, K, threads);
  else
    wg::linear<wg::Fp32Panel, float>(static_cast<const float*>(x), ldx, static_cast<const float*>(packed),
                                     {y, true, N, static_cast<const float*>(bias), N}, M, N, K, threads);
}
