// Paged attention: write the step's keys and values to their slots, then softmax(q k^T * scale) v over each context.
//
// Two ways, chosen per request. One new token (decode): all query heads of a KV head together, keys and values read
// straight from their blocks; a long context is cut into parts that several threads take, merged by the last to
// finish. Several new tokens (prefill): blocks of queries against chunks of 64 keys, both matrix products by the
// panel kernel. Both use the running maximum of Milakov and Gimelshein (2018). Scores and sums are fp32.
//
// H query heads, K KV heads, G = H / K, D head size, S block size. A "row" is one query of one query head.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_parallel.h"
#include "cpu_tile.h"

namespace wg {
namespace {

constexpr float MASKED = -1e30f;       // finite, so that a fully masked chunk yields no NaN; later chunks wipe it out
constexpr int MAX_ROWS = 8;            // rows of a decode task
constexpr int64_t CHUNK = 64;          // keys per pass over a tile of rows
constexpr int64_t AHEAD = 16;          // keys that are prefetched before they are read
constexpr int64_t MIN_PART = 256;      // least keys of a part of a long context
constexpr int64_t MAX_QUERIES = 64;    // queries of a prefill task

template <class T>
struct Batch : WgAttention {
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // elements per token
  T* cache;  // [B, 2, K, S, D]
  T* out;    // contiguous

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t first_visible(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }

  // From a key to its value.
  int64_t to_value() const { return num_kv_heads * block_size * head_dim; }
  int64_t offset(int64_t slot, int64_t kv_head) const {
    return ((slot / block_size * 2 * num_kv_heads + kv_head) * block_size + slot % block_size) * head_dim;
  }
  // Where the cache holds keys [key, key + count) of a request, for one KV head.
  void offsets(int64_t request, int64_t kv_head, int64_t key, int64_t count, int64_t* offsets) const {
    const int32_t* block = block_table + request * block_table_stride + key / block_size;
    for (int64_t i = 0, in_block = key % block_size; i < count; in_block = 0, block++) {
      int64_t at = offset(*block * block_size + in_block, kv_head);
      for (; in_block < block_size && i < count; in_block++, i++, at += head_dim) offsets[i] = at;
    }
  }
};

template <class T>
inline void prefetch(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) __builtin_prefetch(x + i);
}

template <class T>
void write_cache(const Batch<T>& b, int64_t token) {
  const int64_t slot = b.slot_mapping[token], D = b.head_dim;
  if (slot < 0) return;  // padding
  for (int64_t h = 0; h < b.num_kv_heads; h++) {
    T* const key = b.cache + b.offset(slot, h);
    memcpy(key, b.k + token * b.k_stride + h * D, size_t(D) * sizeof(T));
    memcpy(key + b.to_value(), b.v + token * b.v_stride + h * D, size_t(D) * sizeof(T));
  }
}

// ---- decode ----

struct DecodeTask {
  int32_t request, kv_head, first_head, num_rows;
  int32_t begin, end;             // keys
  int32_t part, num_parts, group; // group: index of the counter that the parts share
};

// Unnormalised result of one task: sum of exp(score - maximum) v, and the sum of the exponentials.
struct Partial {
  float maximum[MAX_ROWS], sum[MAX_ROWS];
  float* acc;  // [num_rows][D]
};

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
  constexpr int STEP = NUM_REGS == 32 ? 5 : 2;  // rows whose sums for four keys fit the registers
  for (int64_t i = 0; i < count; i += 4) {
    for (int64_t j = i; j < i + 4; j++) {
      prefetch(cache + offsets[j + AHEAD - 4], D);
      prefetch(cache + offsets[j] + to_value, D);
    }
    constexpr int WHOLE = R / STEP * STEP;
    for (int r = 0; r < WHOLE; r += STEP)
      scores_of_four_keys<STEP>(cache, offsets + i, q + r * padded_d, D, padded_d, scores + r * CHUNK + i);
    if constexpr (WHOLE < R)
      scores_of_four_keys<R - WHOLE>(cache, offsets + i, q + WHOLE * padded_d, D, padded_d, scores + WHOLE * CHUNK + i);
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
  constexpr int ROOM = NUM_REGS == 32 ? 24 : 10, ND = R * 4 <= ROOM ? 4 : R * 2 <= ROOM ? 2 : 1;
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

template <int R, class T>
void decode_rows(const Batch<T>& b, const DecodeTask& task, const float* q, int64_t padded_d, Partial& result) {
  alignas(64) float scores[R * CHUNK];
  int64_t offsets[CHUNK + AHEAD];
  for (int64_t key = task.begin; key < task.end; key += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, task.end - key);
    const int64_t known = std::min<int64_t>(count + AHEAD, task.end - key);
    b.offsets(task.request, task.kv_head, key, known, offsets);
    for (int64_t i = known; i < count + AHEAD; i++) offsets[i] = offsets[known - 1];
    scores_of_rows<R>(b.cache, b.to_value(), offsets, count, q, b.head_dim, padded_d, scores);
    float rescale[R];
    for (int r = 0; r < R; r++)
      rescale[r] = soften(scores + r * CHUNK, count, round_up(count, VL), &result.maximum[r], &result.sum[r]);
    add_values<R>(b.cache + b.to_value(), offsets, count, scores, rescale, b.head_dim, padded_d, result.acc);
  }
}

template <class T>
void decode(const Batch<T>& b, const DecodeTask& task, float* workspace, Partial& result) {
  const int64_t D = b.head_dim, padded_d = round_up(D, VL);
  const T* q = b.q + b.query_start_loc[task.request] * b.q_stride + task.first_head * D;
  for (int r = 0; r < task.num_rows; r++) {
    for (int64_t d = 0; d < padded_d; d++) workspace[r * padded_d + d] = d < D ? to_float(q[r * D + d]) * b.scale : 0.0f;
    result.maximum[r] = MASKED;
    result.sum[r] = 0;
  }
  memset(result.acc, 0, size_t(task.num_rows * padded_d) * sizeof(float));
  using Fn = void (*)(const Batch<T>&, const DecodeTask&, const float*, int64_t, Partial&);
  static constexpr Fn table[MAX_ROWS] = {decode_rows<1, T>, decode_rows<2, T>, decode_rows<3, T>, decode_rows<4, T>,
                                         decode_rows<5, T>, decode_rows<6, T>, decode_rows<7, T>, decode_rows<8, T>};
  table[task.num_rows - 1](b, task, workspace, padded_d, result);
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

// ---- prefill ----
//
// Everything is transposed, so that rows lie along vectors: softmax needs no sums across a vector, and keys and values
// are used as the cache holds them. For a panel of 32 rows and a chunk of keys: scores[key][row] = K Q^T, then
// acc[d][row] += V^T P.

struct PrefillTask {
  int32_t request, kv_head;
  int32_t first_query, num_queries;  // within the request's new tokens
};

// Per-thread buffers of a prefill task; rows are (query, head of the group), heads fastest, padded to whole panels.
struct PrefillBuffers {
  float *q, *acc;        // per panel: [D][PANEL]
  float *maximum, *sum;  // [rows]
  float *keys, *values;  // [CHUNK][D]
  float* scores;         // [CHUNK][PANEL]

  static size_t floats(int64_t rows, int64_t D) { return size_t(2 * rows * (D + 1) + CHUNK * (2 * D + PANEL)); }
  PrefillBuffers(float* at, int64_t rows, int64_t D) {
    q = at, acc = q + rows * D, scores = acc + rows * D, maximum = scores + CHUNK * PANEL, sum = maximum + rows;
    keys = sum + rows, values = keys + CHUNK * D;
  }
};

constexpr int TILE = NUM_REGS == 32 ? 8 : 4;  // rows of a product's tile, which is two vectors wide

// c[m][32] = rescale * c[m][32] + sum_k a[m * a_row + k * a_k] panel[k][32] for m < MR; without rescale c is not read.
template <int MR>
void panel_product(const float* a, int64_t a_row, int64_t a_k, const float* panel, int64_t K, const float* rescale,
                   float* c) {
  for (int v = 0; v < PANEL; v += 2 * VL) {
    vf acc[MR][2] = {};
    if (rescale != nullptr)
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
        for (int j = 0; j < 2; j++) acc[m][j] = load(c + m * PANEL + v + j * VL) * load(rescale + v + j * VL);
    for (int64_t k = 0; k < K; k++) {
      const vf left = load(panel + k * PANEL + v), right = load(panel + k * PANEL + v + VL);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const float value = a[m * a_row + k * a_k];
        acc[m][0] += left * value;
        acc[m][1] += right * value;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
      for (int j = 0; j < 2; j++) store(c + m * PANEL + v + j * VL, acc[m][j]);
  }
}

void product(const float* a, int64_t a_row, int64_t a_k, const float* panel, int64_t K, int64_t num_rows,
             const float* rescale, float* c) {
  int64_t m = 0;
  for (; m + TILE <= num_rows; m += TILE)
    panel_product<TILE>(a + m * a_row, a_row, a_k, panel, K, rescale, c + m * PANEL);
  for (; m < num_rows; m++) panel_product<1>(a + m * a_row, a_row, a_k, panel, K, rescale, c + m * PANEL);
}

// One panel of rows: their absolute positions, and where their state lies in the buffers.
struct RowPanel {
  int32_t position[PANEL];
  int32_t first, last;  // positions of the first and the last row
  float *q, *acc, *maximum, *sum;
};

// scores[key][row] becomes exp(score - maximum), keys that a row does not see 0; updates maximum and sum, and
// returns in rescale what the old maximum's sums must be multiplied by.
void soften_columns(const RowPanel& rows, int64_t first_key, int64_t count, int64_t window, float* scores,
                    float* rescale) {
  const bool masked = first_key + count - 1 > rows.first || (window > 0 && first_key <= rows.last - window);
  const int32_t reach = window > 0 ? int32_t(std::min<int64_t>(window, INT32_MAX)) : INT32_MAX;
  for (int v = 0; v < PANEL; v += VL) {
    vi position;
    memcpy(&position, rows.position + v, sizeof position);
    const vf old = load(rows.maximum + v);
    vf highest = old;
    for (int64_t i = 0; i < count; i++) {
      vf score = load(scores + i * PANEL + v);
      if (masked) {
        const vi back = position - int32_t(first_key + i);  // how far back the key lies
        score = ((back >= 0) & (back < reach)) ? score : splat(MASKED);
        store(scores + i * PANEL + v, score);
      }
      highest = max(highest, score);
    }
    vf total{};
    for (int64_t i = 0; i < count; i++) {
      const vf p = exp(load(scores + i * PANEL + v) - highest);
      store(scores + i * PANEL + v, p);
      total += p;
    }
    const vf scale = exp(old - highest);
    store(rescale + v, scale);
    store(rows.sum + v, load(rows.sum + v) * scale + total);
    store(rows.maximum + v, highest);
  }
}

// Keys and values [key, key + count) in fp32.
template <class T>
void gather_chunk(const Batch<T>& b, const PrefillTask& task, int64_t key, int64_t count, const PrefillBuffers& buf) {
  const int64_t D = b.head_dim;
  int64_t offsets[CHUNK];
  b.offsets(task.request, task.kv_head, key, count, offsets);
  for (int64_t i = 0; i < count; i++) {
    const T *k = b.cache + offsets[i], *v = k + b.to_value();
    for (int64_t d = 0; d < D; d += VL) {
      store_upto(buf.keys + i * D + d, load_upto(k + d, D - d), D - d);
      store_upto(buf.values + i * D + d, load_upto(v + d, D - d), D - d);
    }
  }
}

template <class T>
struct Prefill {
  const Batch<T>& b;
  const PrefillTask& task;
  const int64_t D = b.head_dim, group = b.group(), num_rows = task.num_queries * group;
  const int64_t padded_rows = round_up(num_rows, PANEL);
  const int64_t start = b.query_start_loc[task.request];
  const int64_t first_position =
      b.seq_lens[task.request] - (b.query_start_loc[task.request + 1] - start) + task.first_query;
  PrefillBuffers buf;

  Prefill(const Batch<T>& batch, const PrefillTask& prefill_task, float* workspace)
      : b(batch), task(prefill_task), buf(workspace, padded_rows, D) {}

  // The D elements of a row in q (or out), whose tokens are `stride` elements apart.
  template <class Element>
  Element* row_of(Element* base, int64_t stride, int64_t row) const {
    return base + (start + task.first_query + row / group) * stride + (task.kv_head * group + row % group) * D;
  }

  RowPanel panel(int64_t p) const {
    RowPanel rows{};
    for (int64_t i = 0; i < PANEL; i++)  // padding repeats the last row
      rows.position[i] = int32_t(first_position + std::min(p * PANEL + i, num_rows - 1) / group);
    rows.first = rows.position[0], rows.last = rows.position[PANEL - 1];
    rows.q = buf.q + p * PANEL * D, rows.acc = buf.acc + p * PANEL * D;
    rows.maximum = buf.maximum + p * PANEL, rows.sum = buf.sum + p * PANEL;
    return rows;
  }

  void load_queries() const {
    memset(buf.q, 0, size_t(padded_rows * D) * sizeof(float));
    memset(buf.acc, 0, size_t(padded_rows * D) * sizeof(float));
    for (int64_t row = 0; row < padded_rows; row++) buf.maximum[row] = MASKED, buf.sum[row] = 0;
    for (int64_t row = 0; row < num_rows; row++) {
      const T* q = row_of(b.q, b.q_stride, row);
      float* const column = buf.q + row / PANEL * PANEL * D + row % PANEL;
      for (int64_t d = 0; d < D; d++) column[d * PANEL] = to_float(q[d]) * b.scale;
    }
  }

  void store_results() const {
    for (int64_t row = 0; row < num_rows; row++) {
      T* const out = row_of(b.out, b.num_heads * D, row);
      const float* const column = buf.acc + row / PANEL * PANEL * D + row % PANEL;
      const float inverse_sum = 1.0f / buf.sum[row];
      for (int64_t d = 0; d < D; d++) from_float(column[d * PANEL] * inverse_sum, out + d);
    }
  }

  void run() const {
    load_queries();
    alignas(64) float rescale[PANEL];
    const int64_t end = first_position + task.num_queries;
    for (int64_t key = b.first_visible(first_position); key < end; key += CHUNK) {
      const int64_t count = std::min(CHUNK, end - key);
      gather_chunk(b, task, key, count, buf);
      for (int64_t p = 0; p < padded_rows / PANEL; p++) {
        const RowPanel rows = panel(p);
        if (key > rows.last || key + count <= b.first_visible(rows.first)) continue;
        product(buf.keys, D, 1, rows.q, D, count, nullptr, buf.scores);
        soften_columns(rows, key, count, b.window, buf.scores, rescale);
        product(buf.values, 1, D, buf.scores, count, D, rescale, rows.acc);
      }
    }
    store_results();
  }
};

// ---- planning ----

struct Plan {
  std::vector<DecodeTask> decodes;
  std::vector<PrefillTask> prefills;
  int32_t num_groups = 0;
  int64_t prefill_rows = 0, num_keys = 0;
};

void plan_decode(const WgAttention& b, int32_t request, int64_t part_size, Plan& plan) {
  const int64_t end = b.seq_lens[request], group = b.num_heads / b.num_kv_heads;
  const int64_t begin = b.window > 0 ? std::max<int64_t>(0, end - b.window) : 0;
  const int64_t num_parts = std::max<int64_t>(1, (end - begin) / part_size);
  for (int64_t kv_head = 0; kv_head < b.num_kv_heads; kv_head++)
    for (int64_t row = 0; row < group; row += MAX_ROWS, plan.num_groups++)
      for (int64_t part = 0; part < num_parts; part++)
        plan.decodes.push_back({request, int32_t(kv_head), int32_t(kv_head * group + row),
                                int32_t(std::min<int64_t>(MAX_ROWS, group - row)),
                                int32_t(begin + (end - begin) * part / num_parts),
                                int32_t(begin + (end - begin) * (part + 1) / num_parts), int32_t(part),
                                int32_t(num_parts), plan.num_groups});
}

Plan make_plan(const WgAttention& b) {
  Plan plan;
  int64_t new_queries = 0;
  for (int32_t r = 0; r < b.num_reqs; r++) {
    const int64_t queries = b.query_start_loc[r + 1] - b.query_start_loc[r];
    if (queries == 1) plan.num_keys += b.seq_lens[r] * b.num_kv_heads;
    else new_queries += queries;
  }
  // About four tasks a thread, so that the last ones to finish are short.
  const int64_t part_size = std::max(MIN_PART, plan.num_keys / (b.threads * 4));
  const int64_t block = std::min(MAX_QUERIES, std::max<int64_t>(16, new_queries * b.num_kv_heads / (b.threads * 4)));
  for (int32_t r = 0; r < b.num_reqs; r++) {
    const int32_t queries = b.query_start_loc[r + 1] - b.query_start_loc[r];
    if (queries == 1)
      plan_decode(b, r, part_size, plan);
    else if (queries > 1)
      for (int64_t first = (queries - 1) / block * block; first >= 0; first -= block)  // the longest contexts first
        for (int32_t kv_head = 0; kv_head < b.num_kv_heads; kv_head++)
          plan.prefills.push_back({r, kv_head, int32_t(first), int32_t(std::min<int64_t>(block, queries - first))});
  }
  plan.prefill_rows = round_up(block * (b.num_heads / b.num_kv_heads), PANEL);
  return plan;
}

template <class T>
void run_decode(const Batch<T>& b, const Plan& plan, int64_t index, Partial* partials, std::atomic<int32_t>* finished) {
  static thread_local Scratch scratch;
  const DecodeTask& task = plan.decodes[size_t(index)];
  float* const q = scratch.get<float>(size_t(MAX_ROWS * round_up(b.head_dim, VL)));
  decode(b, task, q, partials[index]);
  if (task.num_parts > 1) {
    if (finished[task.group].fetch_add(1, std::memory_order_acq_rel) + 1 < task.num_parts) return;
    Partial* const first = partials + index - task.part;
    for (int32_t part = 1; part < task.num_parts; part++)
      merge(first[0], first[part], task.num_rows, round_up(b.head_dim, VL));
    write_result(b, task, first[0]);
  } else {
    write_result(b, task, partials[index]);
  }
}

template <class T>
void attend(const Batch<T>& b) {
  static thread_local Scratch acc_scratch;
  const Plan plan = make_plan(b);
  const int64_t num_decodes = int64_t(plan.decodes.size()), num_prefills = int64_t(plan.prefills.size());
  const int64_t acc_size = MAX_ROWS * round_up(b.head_dim, VL);
  std::vector<Partial> partials(plan.decodes.size());
  std::vector<std::atomic<int32_t>> finished(static_cast<size_t>(plan.num_groups));
  float* const acc = acc_scratch.get<float>(size_t(num_decodes * acc_size));
  for (int64_t i = 0; i < num_decodes; i++) partials[size_t(i)].acc = acc + i * acc_size;

  parallel_for(b.num_tokens, 64, b.threads, [&](int64_t token) { write_cache(b, token); });
  const int64_t work = plan.num_keys * b.group() * b.head_dim;  // a short context is not worth waking a thread for
  parallel_for(num_prefills + num_decodes, 1, num_prefills == 0 && work < 32768 ? 1 : b.threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    if (i < num_prefills)
      Prefill<T>(b, plan.prefills[size_t(i)], scratch.get<float>(PrefillBuffers::floats(plan.prefill_rows, b.head_dim)))
          .run();
    else
      run_decode(b, plan, i - num_prefills, partials.data(), finished.data());
  });
}

template <class T>
void attention(const WgAttention& step, const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
               int64_t v_stride, void* cache, void* out) {
  attend(Batch<T>{step, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                  v_stride, static_cast<T*>(cache), static_cast<T*>(out)});
}

}  // namespace
}  // namespace wg

void wg_attention(const WgAttention* step, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                  const void* v, int64_t v_stride, void* cache, void* out) {
  (step->is_bf16 ? wg::attention<wg::bf16> : wg::attention<float>)(*step, q, q_stride, k, k_stride, v, v_stride, cache,
                                                                   out);
}
