// Attention of several new tokens of a request: blocks of queries against chunks of keys.
//
// Everything is transposed, so that rows lie along vectors: softmax needs no sums across a vector, and keys and values
// are used as the cache holds them. For a panel of 32 rows and a chunk of keys: scores[key][row] = K Q^T, then
// acc[d][row] += V^T P.

#include "cpu_attention.h"
#include "cpu_parallel.h"

namespace wg {
namespace {

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

}  // namespace

template <class T>
void run_prefill(const Batch<T>& b, const PrefillTask& task) {
  static thread_local Scratch scratch;
  const int64_t rows = round_up(task.num_queries * b.group(), PANEL);
  Prefill<T>(b, task, scratch.get<float>(PrefillBuffers::floats(rows, b.head_dim))).run();
}

template void run_prefill(const Batch<bf16>&, const PrefillTask&);
template void run_prefill(const Batch<float>&, const PrefillTask&);

}  // namespace wg
