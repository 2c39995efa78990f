// Vectors of the width this compiler target has, and the conversions, exponential and reductions the kernels need.
//
// Written with GCC/Clang vector extensions, so that one source serves AVX-512, AVX2, NEON and plain C++; the few
// intrinsics are guarded by the target's own macros. Knows no shapes and no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wg {

#if defined(__AVX512F__)
constexpr int VL = 16, NUM_REGS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VL = 8, NUM_REGS = 16;
#elif defined(__aarch64__)
constexpr int VL = 4, NUM_REGS = 32;
#else
constexpr int VL = 4, NUM_REGS = 16;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef vf vf_unaligned __attribute__((aligned(4), may_alias));
typedef vu vu_unaligned __attribute__((aligned(4), may_alias));
typedef vh vh_unaligned __attribute__((aligned(2), may_alias));

// bfloat16 is the upper half of an fp32: a struct of its own, so that it is never mistaken for an integer.
struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline vf load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 widens in two halves otherwise
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  const vh h = *reinterpret_cast<const vh_unaligned*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
inline void store(bf16* p, vf x) {  // round to nearest, ties to even; NaN stays NaN
  const vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vi is_nan = x != x;
  rounded = is_nan ? vu{} + 0x7fc0 : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(rounded, vh);
#endif
}

// The first n < VL elements; the rest read as zero and are not written.
template <class T>
inline vf load_part(const T* p, int n) {
  T padded[VL] = {};
  memcpy(padded, p, size_t(n) * sizeof(T));
  return load(padded);
}
template <class T>
inline void store_part(T* p, vf x, int n) {
  T padded[VL];
  store(padded, x);
  memcpy(p, padded, size_t(n) * sizeof(T));
}
template <class T>
inline vf load_upto(const T* p, int64_t n) {
  return n >= VL ? load(p) : load_part(p, int(n));
}
template <class T>
inline void store_upto(T* p, vf x, int64_t n) {
  if (n >= VL)
    store(p, x);
  else
    store_part(p, x, int(n));
}

inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

// Sum and maximum across a vector: halve it until one element is left.
template <class Combine>
inline float reduce(vf v, Combine combine) {
  float x[VL];
#if defined(__AVX512F__)
  const __m256 low = _mm512_castps512_ps256((__m512)v);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
  const __m256 eight = combine(low, high);
  const __m128 four = combine(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  memcpy(x, &four, 16);
#elif defined(__AVX2__)
  const __m128 four = combine(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  memcpy(x, &four, 16);
#else
  memcpy(x, &v, sizeof v);
#endif
  return combine(combine(x[0], x[2]), combine(x[1], x[3]));
}
inline float hsum(vf v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
// sums[i] = hsum(v[i]) for four vectors, which share the last steps.
inline void hsum4(const vf* v, float* sums) {
#if defined(__AVX2__)
  __m128 x[4];
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v[i], 1));
    const __m256 eight = _mm512_castps512_ps256((__m512)v[i]) + high;
#else
    const __m256 eight = (__m256)v[i];
#endif
    x[i] = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  }
  _mm_storeu_ps(sums, _mm_hadd_ps(_mm_hadd_ps(x[0], x[1]), _mm_hadd_ps(x[2], x[3])));
#else
  for (int i = 0; i < 4; i++) sums[i] = hsum(v[i]);
#endif
}
inline float hmax(vf v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// exp(x) to about 1e-7 relative (Cephes expf); 0 below -87.3, infinite above 88.3, NaN for NaN.
inline vf exp(vf x) {
  const vi underflow = x < -87.3f;
  x = min(splat(88.8f), max(splat(-87.3f), x));      // in this order a NaN survives
  const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const vf n = shifted - 12582912.0f;
  const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf y = p * r * r + r + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return underflow ? vf{} : y * (vf)power;
}

}  // namespace wg
