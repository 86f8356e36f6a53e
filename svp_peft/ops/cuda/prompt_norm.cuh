// What the two kernels share that add prompts to the tokens and normalise: a token from its
// pre-activations to the normalised row, by one warp. x, cross, inner and residual are a RowOf, which
// is in registers already, or a RowAt.
//
// Macros: those of norm.cuh, ACT, RESIDUAL_T, HAS_BIAS, HAS_MASK, IS_SKIPPED(t).
#include "norm.cuh"

template <int BYTES> struct WordOf { typedef u32 type; };
template <> struct WordOf<2> { typedef u16 type; };

// A lane's share of one row, as it lies in memory: in whole registers, because the compiler takes
// halves apart, and so waits for them, where they pass from one part of a kernel to the next.
template <class T> struct RowOf {
  static constexpr int BYTES = sizeof(T) * PACK, WORDS = BYTES < 4 ? 1 : BYTES / 4;
  using Words = Pack<typename WordOf<BYTES>::type, WORDS>;
  Words share[ACCESSES];

  DEVICE void fetch(const T* row, int lane) {
#pragma unroll
    for (int i = 0; i < ACCESSES; i++) {
      const int column = (i * 32 + lane) * PACK;
      if constexpr (!EVEN) share[i] = Words{};
      if (EVEN || column < D_MODEL) share[i] = *(const Words*)(row + column);
    }
  }
  DEVICE void write(T* row, int lane) const {
#pragma unroll
    for (int i = 0; i < ACCESSES; i++) {
      const int column = (i * 32 + lane) * PACK;
      if (EVEN || column < D_MODEL) *(Words*)(row + column) = share[i];
    }
  }
  DEVICE void widened(float (*out)[PACK]) const {
#pragma unroll
    for (int i = 0; i < ACCESSES; i++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const auto bits = share[i].v[w];
        if constexpr (sizeof(T) == 4) out[i][w] = __uint_as_float(bits);
        else if constexpr (BYTES == 2) out[i][w] = widen(T{bits});
        else widen_pair(T{}, bits, out[i][2 * w], out[i][2 * w + 1]);
      }
  }
};
// The same, read when it is needed.
template <class T> struct RowAt {
  const T* row;
  int lane;
  DEVICE void widened(float (*out)[PACK]) const { read_row(row, lane, out); }
};

template <class Args, class X, class Inner, class Residual>
DEVICE void prompt_and_normalise(const Args& args, int token, int lane, const X& x, const X& cross,
                                 const Inner& inner, const Residual& residual) {
  const i64 row = (i64)token * D_MODEL;
  float total[ACCESSES][PACK], before[ACCESSES][PACK], weight[ACCESSES][PACK];
  x.widened(total);
  const int t = token % args.length;
  if (!(IS_SKIPPED(t))) {
    float sum[ACCESSES][PACK];
    inner.widened(before);
    read_row(args.beta, lane, weight);
    EACH(i, p) sum[i][p] = weight[i][p] * (before[i][p] * sigmoid(before[i][p]));
    cross.widened(before);
    read_row(args.alpha, lane, weight);
    EACH(i, p) sum[i][p] = fmaf(weight[i][p], before[i][p] * sigmoid(before[i][p]), sum[i][p]);
    // rounded as where the prompted tokens are a tensor of their own
    EACH(i, p) total[i][p] = widen(narrowed<ACT>(total[i][p] + sum[i][p]));
  }
  if constexpr (HAS_MASK) {
    const float keep = args.mask[token / args.length] * args.mask_scale;
    EACH(i, p) total[i][p] *= keep;
  }
  residual.widened(before);
  EACH(i, p) total[i][p] += before[i][p];
  write_row(args.total + row, lane, total);
  const float scale = normaliser(total, lane, args.eps);
  read_row(args.weight, lane, weight);
  EACH(i, p) total[i][p] *= scale * weight[i][p];
  if constexpr (HAS_BIAS) {
    read_row(args.bias, lane, weight);
    EACH(i, p) total[i][p] += weight[i][p];
  }
  write_row(args.y + row, lane, total);
}
