// What the parts of paged attention share: the batch, where its keys and values lie, and the tasks it is cut into.
//
// H query heads, K KV heads, G = H / K, D head size, S block size. A "row" is one query of one query head. Scores and
// sums are fp32, both parts use the running maximum of Milakov and Gimelshein (2018).
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu_kernels.h"
#include "cpu_tile.h"

namespace wg {

constexpr float MASKED = -1e30f;  // finite, so that a fully masked chunk yields no NaN; later chunks wipe it out
constexpr int64_t CHUNK = 64;     // keys per pass over the rows of a task
constexpr int MAX_ROWS = 16;      // rows of a decode task

template <class T>
struct Batch : WgAttention {
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // elements per token
  T* cache;                              // [B, 2, K, S, D]
  T* out;                                // contiguous

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

// One new token's rows of one KV head against a part of its context.
struct DecodeTask {
  int32_t request, kv_head, first_head, num_rows;
  int32_t begin, end;              // keys
  int32_t part, num_parts, group;  // group: index of the counter that the parts share
};

// Unnormalised result of a decode task: sum of exp(score - maximum) v, and the sum of the exponentials.
struct Partial {
  float maximum[MAX_ROWS], sum[MAX_ROWS];
  float* acc;  // [num_rows][D]
};

// Do tasks[index]; whoever finishes the last part of a context merges the parts and writes the output. `finished` has
// a counter per group, `partials` an entry per task.
template <class T>
void run_decode(const Batch<T>& b, const DecodeTask* tasks, int64_t index, Partial* partials,
                std::atomic<int32_t>* finished);

// Several new tokens of one request: a block of queries, one KV head.
struct PrefillTask {
  int32_t request, kv_head;
  int32_t first_query, num_queries;  // within the request's new tokens
};

template <class T>
void run_prefill(const Batch<T>& b, const PrefillTask& task);

}  // namespace wg
