// Attention of one new token: all query heads of a KV head together, keys and values read straight from their blocks.
//
// A long context is cut into parts that several threads take.

#include <cmath>
#include <utility>

#include "cpu_attention.h"
#include "cpu_parallel.h"

namespace wg {
namespace {

constexpr int ROWS = NUM_REGS == 32 ? 4 : 2;  // rows that pass over a chunk together: their sums fit the registers
constexpr int64_t AHEAD = 16;                 // keys that are prefetched before they are read

// Dot products of R rows with the keys at offsets[0..3], to scores[r][0..3].
template <int R, class T>
inline void scores_of_four_keys(const T* cache, const int64_t* offsets, const float* q, int64_t D, int64_t padded_d,
                                float* scores) {
  vf acc[R][4] = {};
  for (int64_t d = 0; d < D; d += VL) {
    vf k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) k[i] = load_upto(cache + offsets[i] + d, D - d);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf row = load(q + r * padded_d + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) acc[r][i] += k[i] * row;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) hsum4(acc[r], scores + r * CHUNK);
}

// scores[r][i] = q_r . k_i for the keys at `offsets`, four at a time: scores past count are rubbish. q is fp32, scaled,
// padded with zeros to whole vectors. Offsets reach AHEAD beyond count: keys that are read soon, and the values that
// add_values wants next, are fetched ahead, because blocks are scattered.
template <int R, class T>
void scores_of_rows(const T* cache, int64_t to_value, const int64_t* offsets, int64_t count, const float* q, int64_t D,
                    int64_t padded_d, float* scores) {
  for (int64_t i = 0; i < count; i += 4) {
    for (int64_t j = i; j < i + 4; j++) {
      prefetch(cache + offsets[j + AHEAD - 4], D);
      prefetch(cache + offsets[j] + to_value, D);
    }
    scores_of_four_keys<R>(cache, offsets + i, q, D, padded_d, scores + i);
  }
}

// acc[r][d] = acc[r][d] * rescale[r] + sum_i p[r][i] v_i[d] for ND vectors d.
template <int R, int ND, class T>
inline void add_value_columns(const T* values, const int64_t* offsets, int64_t count, const float* p,
                              const float* rescale, int64_t d, int64_t left, int64_t padded_d, float* acc) {
  vf sum[R][ND];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++) sum[r][j] = load(acc + r * padded_d + d + j * VL) * rescale[r];
  for (int64_t i = 0; i < count; i++) {
    vf v[ND];
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++)
      v[j] = ND > 1 ? load(values + offsets[i] + d + j * VL) : load_upto(values + offsets[i] + d, left);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < ND; j++) sum[r][j] += v[j] * p[r * CHUNK + i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++) store(acc + r * padded_d + d + j * VL, sum[r][j]);
}

template <int R, class T>
void add_values(const T* values, const int64_t* offsets, int64_t count, const float* p, const float* rescale, int64_t D,
                int64_t padded_d, float* acc) {
  constexpr int ND = NUM_REGS == 32 || R == 1 ? 4 : 2;  // vectors whose sums fit the registers
  int64_t d = 0;
  for (; d + ND * VL <= D; d += ND * VL)
    add_value_columns<R, ND>(values, offsets, count, p, rescale, d, D - d, padded_d, acc);
  for (; d < D; d += VL) add_value_columns<R, 1>(values, offsets, count, p, rescale, d, D - d, padded_d, acc);
}

// scores[i] = exp(scores[i] - new maximum) for whole vectors; entries from count on become 0. Returns the old
// maximum's weight exp(old - new) and updates maximum and sum.
float soften(float* scores, int64_t count, int64_t padded_count, float* maximum, float* sum) {
  for (int64_t i = count; i < padded_count; i++) scores[i] = MASKED;
  vf highest = splat(*maximum);
  for (int64_t i = 0; i < padded_count; i += VL) highest = max(highest, load(scores + i));
  const float new_maximum = hmax(highest);
  const float rescale = new_maximum == *maximum ? 1.0f : std::exp(*maximum - new_maximum);
  vf total{};
  for (int64_t i = 0; i < padded_count; i += VL) {
    const vf p = exp(load(scores + i) - new_maximum);
    store(scores + i, p);
    total += p;
  }
  *sum = *sum * rescale + hsum(total);
  *maximum = new_maximum;
  return rescale;
}

// R rows, the first being `row`, against one chunk of keys.
template <int R, class T>
void decode_rows(const Batch<T>& b, const int64_t* offsets, int64_t count, const float* q, int row, Partial& result) {
  const int64_t D = b.head_dim, padded_d = round_up(D, VL);
  alignas(64) float scores[R * CHUNK];
  scores_of_rows<R>(b.cache, b.to_value(), offsets, count, q + row * padded_d, D, padded_d, scores);
  float rescale[R];
  for (int r = 0; r < R; r++)
    rescale[r] = soften(scores + r * CHUNK, count, round_up(count, VL), &result.maximum[row + r], &result.sum[row + r]);
  add_values<R>(b.cache + b.to_value(), offsets, count, scores, rescale, D, padded_d, result.acc + row * padded_d);
}

template <class T, int... I>
void decode_chunk(const Batch<T>& b, const int64_t* offsets, int64_t count, const float* q, int num_rows,
                  Partial& result, std::integer_sequence<int, I...>) {
  using Fn = void (*)(const Batch<T>&, const int64_t*, int64_t, const float*, int, Partial&);
  static constexpr Fn table[] = {decode_rows<I + 1, T>...};
  for (int row = 0; row < num_rows; row += ROWS)
    table[std::min(ROWS, num_rows - row) - 1](b, offsets, count, q, row, result);
}

template <class T>
void decode(const Batch<T>& b, const DecodeTask& task, float* q, Partial& result) {
  const int64_t D = b.head_dim, padded_d = round_up(D, VL);
  const T* from = b.q + b.query_start_loc[task.request] * b.q_stride + task.first_head * D;
  for (int r = 0; r < task.num_rows; r++) {
    for (int64_t d = 0; d < padded_d; d++) q[r * padded_d + d] = d < D ? to_float(from[r * D + d]) * b.scale : 0.0f;
    result.maximum[r] = MASKED;
    result.sum[r] = 0;
  }
  memset(result.acc, 0, size_t(task.num_rows * padded_d) * sizeof(float));
  int64_t offsets[CHUNK + AHEAD];
  for (int64_t key = task.begin; key < task.end; key += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, task.end - key);
    const int64_t known = std::min<int64_t>(count + AHEAD, task.end - key);
    b.offsets(task.request, task.kv_head, key, known, offsets);
    for (int64_t i = known; i < count + AHEAD; i++) offsets[i] = offsets[known - 1];
    decode_chunk(b, offsets, count, q, task.num_rows, result, std::make_integer_sequence<int, ROWS>{});
  }
}

template <class T>
void write_result(const Batch<T>& b, const DecodeTask& task, const Partial& result) {
  const int64_t D = b.head_dim, padded_d = round_up(D, VL);
  T* out = b.out + (b.query_start_loc[task.request] * b.num_heads + task.first_head) * D;
  for (int r = 0; r < task.num_rows; r++)
    for (int64_t d = 0; d < D; d += VL)
      store_upto(out + r * D + d, load(result.acc + r * padded_d + d) / result.sum[r], D - d);
}

// Bring `other` into `into`: both keep their sums relative to their own maximum.
void merge(Partial& into, const Partial& other, int num_rows, int64_t padded_d) {
  for (int r = 0; r < num_rows; r++) {
    const float maximum = std::max(into.maximum[r], other.maximum[r]);
    const float a = std::exp(into.maximum[r] - maximum), c = std::exp(other.maximum[r] - maximum);
    float *x = into.acc + r * padded_d, *y = other.acc + r * padded_d;
    for (int64_t d = 0; d < padded_d; d += VL) store(x + d, load(x + d) * a + load(y + d) * c);
    into.sum[r] = into.sum[r] * a + other.sum[r] * c;
    into.maximum[r] = maximum;
  }
}

}  // namespace

template <class T>
void run_decode(const Batch<T>& b, const DecodeTask* tasks, int64_t index, Partial* partials,
                std::atomic<int32_t>* finished) {
  static thread_local Scratch scratch;
  const DecodeTask& task = tasks[index];
  const int64_t padded_d = round_up(b.head_dim, VL);
  decode(b, task, scratch.get<float>(size_t(MAX_ROWS * padded_d)), partials[index]);
  if (task.num_parts > 1 && finished[task.group].fetch_add(1, std::memory_order_acq_rel) + 1 < task.num_parts) return;
  Partial* const first = partials + index - task.part;
  for (int32_t part = 1; part < task.num_parts; part++) merge(first[0], first[part], task.num_rows, padded_d);
  write_result(b, task, first[0]);
}

template void run_decode(const Batch<bf16>&, const DecodeTask*, int64_t, Partial*, std::atomic<int32_t>*);
template void run_decode(const Batch<float>&, const DecodeTask*, int64_t, Partial*, std::atomic<int32_t>*);

}  // namespace wg
