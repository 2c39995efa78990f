// Paged attention: write the step's keys and values to their slots, then softmax(q k^T * scale) v over each context.
//
// Cuts the batch into tasks that threads take: a request with one new token (decode) by KV heads and parts of its
// context, one with several (prefill) by KV heads and blocks of queries.

#include "cpu_attention.h"

#include <vector>

#include "cpu_parallel.h"

namespace wg {
namespace {

constexpr int64_t MIN_PART = 256;    // least keys of a part of a long context
constexpr int64_t MAX_QUERIES = 64;  // queries of a prefill task

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

struct Plan {
  std::vector<DecodeTask> decodes;
  std::vector<PrefillTask> prefills;
  int32_t num_groups = 0;
  int64_t num_keys = 0;  // of decodes, over all KV heads
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
    if (queries == 1)
      plan.num_keys += b.seq_lens[r] * b.num_kv_heads;
    else
      new_queries += queries;
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
  return plan;
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
    if (i < num_prefills)
      run_prefill(b, plan.prefills[size_t(i)]);
    else
      run_decode(b, plan.decodes.data(), i - num_prefills, partials.data(), finished.data());
  });
}

template <class T>
void attention(const WgAttention& step, const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
               int64_t v_stride, void* cache, void* out) {
  attend(Batch<T>{step, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride,
                  k_stride, v_stride, static_cast<T*>(cache), static_cast<T*>(out)});
}

}  // namespace
}  // namespace wg

void wg_attention(const WgAttention* step, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                  const void* v, int64_t v_stride, void* cache, void* out) {
  (step->is_bf16 ? wg::attention<wg::bf16> : wg::attention<float>)(*step, q, q_stride, k, k_stride, v, v_stride, cache,
                                                                   out);
}
