// The model's small operations (workers/kernels/functional.py says what they compute): one pass each, fp32 inside.
//
// T tokens (rows), N features, H heads, D head size.

#include <cmath>
#include <initializer_list>

#include "cpu_kernels.h"
#include "cpu_parallel.h"
#include "cpu_vector.h"

namespace wg {
namespace {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t SERIAL_ELEMENTS = 16384;

int threads_for(int64_t elements, int threads) { return elements < SERIAL_ELEMENTS ? 1 : threads; }

// sum = x (+ residual), kept rounded in new_residual; y = sum / rms(sum) * weight.
template <class T, bool ADD>
void norm_row(const T* x, const T* residual, const T* weight, T* y, T* new_residual, int64_t N, float eps) {
  vf squares{};
  for (int64_t i = 0; i < N; i += VL) {
    vf v = load_upto(x + i, N - i);
    if (ADD) {
      store_upto(new_residual + i, v + load_upto(residual + i, N - i), N - i);
      v = load_upto(new_residual + i, N - i);
    }
    squares += v * v;
  }
  const float inverse_rms = 1.0f / std::sqrt(hsum(squares) / float(N) + eps);
  const T* const source = ADD ? new_residual : x;
  for (int64_t i = 0; i < N; i += VL) {
    const vf v = load_upto(source + i, N - i) * inverse_rms * load_upto(weight + i, N - i);
    store_upto(y + i, v, N - i);
  }
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, int64_t rows_per_token, const T* residual, const T* weight, T* y,
              T* new_residual, int64_t num_rows, int64_t N, float eps, int threads) {
  parallel_for(num_rows, 4, threads_for(num_rows * N, threads), [&](int64_t r) {
    const T* row = x + r / rows_per_token * x_stride + r % rows_per_token * N;
    if (residual == nullptr)
      norm_row<T, false>(row, nullptr, weight, y + r * N, nullptr, N, eps);
    else
      norm_row<T, true>(row, residual + r * N, weight, y + r * N, new_residual + r * N, N, eps);
  });
}

template <class T>
void silu_and_mul(const T* gate_up, T* y, int64_t num_rows, int64_t N, int threads) {
  parallel_for(num_rows, 1, threads_for(num_rows * N, threads), [&](int64_t t) {
    const T *gate = gate_up + t * 2 * N, *up = gate + N;
    for (int64_t i = 0; i < N; i += VL) {
      const vf g = load_upto(gate + i, N - i);
      store_upto(y + t * N + i, g / (exp(-g) + 1.0f) * load_upto(up + i, N - i), N - i);
    }
  });
}

template <class T>
void rotate_head(const T* x, const float* cos, const float* sin, T* y, int64_t half) {
  for (int64_t i = 0; i < half; i += VL) {
    const vf c = load_upto(cos + i, half - i), s = load_upto(sin + i, half - i);
    const vf first = load_upto(x + i, half - i), second = load_upto(x + half + i, half - i);
    store_upto(y + i, first * c - second * s, half - i);
    store_upto(y + half + i, second * c + first * s, half - i);
  }
}

template <class T>
struct Heads {
  const T* x;
  int64_t token_stride, num_heads;
  T* y;  // contiguous
};

template <class T>
void rope(const Heads<T>& q, const Heads<T>& k, const int64_t* positions, const float* cos_sin, int64_t num_tokens,
          int64_t D, int threads) {
  parallel_for(num_tokens, 4, threads_for(num_tokens * (q.num_heads + k.num_heads) * D, threads), [&](int64_t t) {
    const float *cos = cos_sin + positions[t] * D, *sin = cos + D / 2;
    for (const Heads<T>* part : {&q, &k})
      for (int64_t h = 0; h < part->num_heads; h++)
        rotate_head(part->x + t * part->token_stride + h * D, cos, sin, part->y + (t * part->num_heads + h) * D, D / 2);
  });
}

}  // namespace
}  // namespace wg

using wg::bf16;

void wg_copy_rows(const int64_t* rows, const void* table, void* out, int64_t num_rows, int64_t row_bytes, int threads) {
  wg::parallel_for(num_rows, 16, wg::threads_for(num_rows * row_bytes, threads), [&](int64_t i) {
    memcpy(static_cast<char*>(out) + i * row_bytes, static_cast<const char*>(table) + rows[i] * row_bytes,
           size_t(row_bytes));
  });
}

void wg_rms_norm(const void* x, int64_t x_stride, int64_t rows_per_token, const void* residual, const void* weight,
                 void* y, void* new_residual, int64_t num_rows, int64_t N, float eps, int is_bf16, int threads) {
  if (is_bf16)
    wg::rms_norm(static_cast<const bf16*>(x), x_stride, rows_per_token, static_cast<const bf16*>(residual),
                 static_cast<const bf16*>(weight), static_cast<bf16*>(y), static_cast<bf16*>(new_residual), num_rows, N,
                 eps, threads);
  else
    wg::rms_norm(static_cast<const float*>(x), x_stride, rows_per_token, static_cast<const float*>(residual),
                 static_cast<const float*>(weight), static_cast<float*>(y), static_cast<float*>(new_residual), num_rows,
                 N, eps, threads);
}

void wg_silu_and_mul(const void* gate_up, void* y, int64_t num_rows, int64_t N, int is_bf16, int threads) {
  if (is_bf16)
    wg::silu_and_mul(static_cast<const bf16*>(gate_up), static_cast<bf16*>(y), num_rows, N, threads);
  else
    wg::silu_and_mul(static_cast<const float*>(gate_up), static_cast<float*>(y), num_rows, N, threads);
}

void wg_rope(const void* q, int64_t q_stride, int64_t num_heads, const void* k, int64_t k_stride, int64_t num_kv_heads,
             const int64_t* positions, const float* cos_sin, void* q_out, void* k_out, int64_t num_tokens, int64_t D,
             int is_bf16, int threads) {
  if (is_bf16)
    wg::rope<bf16>({static_cast<const bf16*>(q), q_stride, num_heads, static_cast<bf16*>(q_out)},
                   {static_cast<const bf16*>(k), k_stride, num_kv_heads, static_cast<bf16*>(k_out)}, positions, cos_sin,
                   num_tokens, D, threads);
  else
    wg::rope<float>({static_cast<const float*>(q), q_stride, num_heads, static_cast<float*>(q_out)},
                    {static_cast<const float*>(k), k_stride, num_kv_heads, static_cast<float*>(k_out)}, positions,
                    cos_sin, num_tokens, D, threads);
}
