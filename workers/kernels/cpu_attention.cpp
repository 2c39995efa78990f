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

#include "cpu_parallel.h"
#include "cpu_tile.h"

namespace wg {
namespace {

constexpr float MASKED = -1e30f;       // finite, so that a fully masked chunk yields no NaN; later chunks wipe it out
constexpr int MAX_ROWS = 8;            // rows of a decode task
constexpr int64_t CHUNK = 64;          // keys per pass over a tile of rows
constexpr int64_t PREFETCH_KEYS = 12;  // keys ahead that are prefetched: blocks are scattered
constexpr int64_t MIN_PART = 256;      // least keys of a part of a long context
constexpr int64_t MAX_QUERIES = 64;    // queries of a prefill task

extern "C" struct WgAttention {  // mirrored by workers/kernels/cpu_ops.py
  int64_t num_reqs, num_tokens;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t window;              // keys visible to a query, its own included; 0 is all
  int64_t block_table_stride;  // entries per request
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  const int64_t* slot_mapping;
  float scale;
  int32_t is_bf16, threads;
};

template <class T>
struct Batch : WgAttention {
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // elements per token
  T *k_cache, *v_cache;
  T* out;  // contiguous

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t first_visible(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }

  // Where the cache keeps keys [key, key + count) of a request, for one KV head; values alike.
  void offsets(int64_t request, int64_t kv_head, int64_t key, int64_t count, int64_t* offsets) const {
    const int64_t per_key = num_kv_heads * head_dim;
    int64_t in_block = key % block_size;
    const int32_t* block = block_table + request * block_table_stride + key / block_size;
    for (int64_t i = 0; i < count; i++) {
      offsets[i] = (*block * block_size + in_block) * per_key + kv_head * head_dim;
      if (++in_block == block_size) in_block = 0, block++;
    }
  }
};

template <class T>
void write_cache(const Batch<T>& b, int64_t token) {
  const int64_t slot = b.slot_mapping[token], width = b.num_kv_heads * b.head_dim;
  if (slot < 0) return;  // padding
  memcpy(b.k_cache + slot * width, b.k + token * b.k_stride, size_t(width) * sizeof(T));
  memcpy(b.v_cache + slot * width, b.v + token * b.v_stride, size_t(width) * sizeof(T));
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

// scores[r][i] = q_r . k_i for keys at `offsets`; q is fp32, scaled, padded with zeros to whole vectors.
template <class T>
inline void prefetch(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) __builtin_prefetch(x + i);
}

template <int R, class T>
void scores_of_rows(const T* k_cache, const T* v_cache, const int64_t* offsets, int64_t count, const float* q, int64_t D, int64_t padded_d,
                    float* scores) {
  const int64_t whole = D / VL * VL;
  for (int64_t i = 0; i < count; i++) {
    const T* key = k_cache + offsets[i];
    prefetch(k_cache + offsets[std::min(i + PREFETCH_KEYS, count - 1)], D);
    prefetch(v_cache + offsets[i], D);
    vf acc[R] = {};
    for (int64_t d = 0; d < whole; d += VL) {
      const vf k = load(key + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] += k * load(q + r * padded_d + d);
    }
    if (whole < D) {
      const vf k = load_part(key + whole, int(D - whole));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] += k * load(q + r * padded_d + whole);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) scores[r * CHUNK + i] = hsum(acc[r]);
  }
}

// acc[r] = acc[r] * rescale[r] + sum_i p[r][i] v_i
template <int R, class T>
void add_values(const T* v_cache, const int64_t* offsets, int64_t count, const float* p, const float* rescale, int64_t D,
                int64_t padded_d, float* acc) {
  for (int64_t d = 0; d < D; d += VL) {
    vf sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = load(acc + r * padded_d + d) * rescale[r];
    for (int64_t i = 0; i < count; i++) {
      const vf v = load_upto(v_cache + offsets[i] + d, D - d);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r] += v * p[r * CHUNK + i];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(acc + r * padded_d + d, sum[r]);
  }
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
  int64_t offsets[CHUNK];
  for (int64_t key = task.begin; key < task.end; key += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, task.end - key);
    b.offsets(task.request, task.kv_head, key, count, offsets);
    scores_of_rows<R>(b.k_cache, b.v_cache, offsets, count, q, b.head_dim, padded_d, scores);
    float rescale[R];
    for (int r = 0; r < R; r++)
      rescale[r] = soften(scores + r * CHUNK, count, round_up(count, VL), &result.maximum[r], &result.sum[r]);
    add_values<R>(b.v_cache, offsets, count, scores, rescale, b.head_dim, padded_d, result.acc);
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
    prefetch(b.k_cache + offsets[std::min(i + PREFETCH_KEYS, count - 1)], D);
    prefetch(b.v_cache + offsets[std::min(i + PREFETCH_KEYS, count - 1)], D);
    for (int64_t d = 0; d < D; d += VL) {
      store_upto(buf.keys + i * D + d, load_upto(b.k_cache + offsets[i] + d, D - d), D - d);
      store_upto(buf.values + i * D + d, load_upto(b.v_cache + offsets[i] + d, D - d), D - d);
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
               int64_t v_stride, void* k_cache, void* v_cache, void* out) {
  attend(Batch<T>{step, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                  v_stride, static_cast<T*>(k_cache), static_cast<T*>(v_cache), static_cast<T*>(out)});
}

}  // namespace
}  // namespace wg

// Strides are elements between tokens; heads and dimensions are contiguous. out is contiguous.
extern "C" void wg_attention(const wg::WgAttention* step, const void* q, int64_t q_stride, const void* k,
                             int64_t k_stride, const void* v, int64_t v_stride, void* k_cache, void* v_cache, void* out) {
  (step->is_bf16 ? wg::attention<wg::bf16> : wg::attention<float>)(*step, q, q_stride, k, k_stride, v, v_stride, k_cache,
                                                                   v_cache, out);
}
