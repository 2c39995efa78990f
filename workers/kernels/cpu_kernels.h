// The C functions that workers/kernels/cpu_ops.py calls, and programs run. No function keeps a pointer.
//
// is_bf16: elements are bf16, otherwise fp32. ld* and *_stride: elements between rows or tokens. threads: how many may
// work on it; within a program it is the team's.
#pragma once

#include <cstdint>

extern "C" {

// Reorder an [N, K] weight into panels (cpu_tile.h). packed holds round_up(N, 32) * padded K elements and may be
// weight itself where nothing is padded.
void wg_pack(const void* weight, void* packed, int64_t N, int64_t K, int is_bf16, int threads);

// Rows of the original weight: an embedding look-up in the packed form.
void wg_unpack_rows(const int64_t* rows, const void* packed, void* out, int64_t num_rows, int64_t K, int is_bf16,
                    int threads);

// Rows of a table of row_bytes each. As everywhere, row numbers and positions are trusted: the engine checks token ids
// when a request arrives.
void wg_copy_rows(const int64_t* rows, const void* table, void* out, int64_t num_rows, int64_t row_bytes, int threads);

// y[M, N] = x[M, K] W^T + bias (which may be null); y is fp32, or in the dtype of the rest.
void wg_linear(const void* x, int64_t ldx, const void* packed, const void* bias, void* y, int y_is_fp32, int64_t M,
               int64_t N, int64_t K, int is_bf16, int threads);

// Row r of x is at r / rows_per_token tokens and r % rows_per_token rows of N; y is contiguous. residual and
// new_residual are both null (plain norm) or both given, contiguous (x is added to residual first).
void wg_rms_norm(const void* x, int64_t x_stride, int64_t rows_per_token, const void* residual, const void* weight,
                 void* y, void* new_residual, int64_t num_rows, int64_t N, float eps, int is_bf16, int threads);

// y[rows, N] = silu(gate) * up for gate_up[rows, 2 N].
void wg_silu_and_mul(const void* gate_up, void* y, int64_t num_rows, int64_t N, int is_bf16, int threads);

// q_out, k_out are contiguous; cos_sin[positions, D] is cat(cos, sin).
void wg_rope(const void* q, int64_t q_stride, int64_t num_heads, const void* k, int64_t k_stride, int64_t num_kv_heads,
             const int64_t* positions, const float* cos_sin, void* q_out, void* k_out, int64_t num_tokens, int64_t D,
             int is_bf16, int threads);

// One step's geometry; mirrored by cpu_ops.AttentionStep.
struct WgAttention {
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

// Write k and v to their slots of cache [B, 2, K, S, D], then attend; out is contiguous.
void wg_attention(const WgAttention* step, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                  const void* v, int64_t v_stride, void* cache, void* out);

// One argument of a recorded call: an integer or an address as it is, a float's bits, a number per token, an offset
// from a base, or the number of threads.
struct WgOperand {
  int64_t value;
  int32_t kind, base;
};
struct WgInstruction {
  int64_t kernel;
  WgOperand operands[14];
};

// Run recorded calls for num_tokens tokens; see cpu_program.cpp.
void wg_run_program(const WgInstruction* instructions, int64_t count, void* const* bases, int64_t num_tokens,
                    int threads);
}
