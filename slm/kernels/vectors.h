// Vectors of LANES floats, the compiler's own, for whatever instructions there are: what this
// folder's kernels in C++ have in common. Compiled steps, which they become a part of, are built
// without inlining what is small, so everything here insists on it.
#define SLM_INLINE static inline __attribute__((always_inline))

namespace slm {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef float HalfOfFloats __attribute__((vector_size(2 * LANES), aligned(4)));
typedef float QuarterOfFloats __attribute__((vector_size(LANES), aligned(4)));
// Named wherever one is pointed to: `auto` would forget that they need not be aligned.

SLM_INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// Of bf16, which is the upper half of an fp32.
SLM_INLINE Floats load(const uint16_t* from) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
  return reinterpret_cast<const Floats&>(words);
}

SLM_INLINE float value(const float* from) { return *from; }

SLM_INLINE float value(const uint16_t* from) {
  const uint32_t word = static_cast<uint32_t>(*from) << 16;
  return reinterpret_cast<const float&>(word);
}

SLM_INLINE void store(float* to, Floats values) { *reinterpret_cast<Floats*>(to) = values; }

SLM_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

SLM_INLINE float total(Floats values) {
  const HalfOfFloats* halves = reinterpret_cast<const HalfOfFloats*>(&values);
  const HalfOfFloats half = halves[0] + halves[1];
  const QuarterOfFloats* quarters = reinterpret_cast<const QuarterOfFloats*>(&half);
  const QuarterOfFloats quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

SLM_INLINE float largest(Floats values) {
  const HalfOfFloats* halves = reinterpret_cast<const HalfOfFloats*>(&values);
  const HalfOfFloats half = halves[0] > halves[1] ? halves[0] : halves[1];
  const QuarterOfFloats* quarters = reinterpret_cast<const QuarterOfFloats*>(&half);
  const QuarterOfFloats quarter = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  return std::max(std::max(quarter[0], quarter[1]), std::max(quarter[2], quarter[3]));
}

// e to the power of values that are not above zero: 2^n e^r with |r| <= ln 2 / 2, by the series.
SLM_INLINE Floats exp_of_negative(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Ints power = (n + 127) << 23;
  return sum * reinterpret_cast<const Floats&>(power);
}

}  // namespace slm
