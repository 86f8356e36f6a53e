// prompt_norm_forward of prompt_norm.cu from one product further back: inner = middle U^T + d is made
// here, on the tensor cores, and need not exist in memory.
//
// U stays in shared memory while a block walks over tiles of 16 tokens. Its warps share the columns of
// a tile's inner, then its tokens, a whole row in the registers of one warp. What those read is asked
// for before the product, so that it arrives meanwhile.
//
// Macros: those of prompt_norm.cu with ACT of 16 bits, BOTTLENECK (a multiple of 8), TILE_WARPS
// (divides 16), BLOCKS (per multiprocessor at least), KEEPS_INNER.
#include "prompt_norm.cuh"

struct Args {
  const ACT* x;
  const ACT* joint;  // [cross | middle], cross before its activation
  const ACT *up, *up_bias;  // U, d
  ACT* inner;
  const float *alpha, *beta;
  const RESIDUAL_T* residual;
  const W_T* weight;
  const BIAS_T* bias;
  ACT* y;
  RESIDUAL_T* total;
  const float* mask;  // one number per image that the prompted tokens are multiplied with, or null
  int tokens, length, joint_row;
  float eps, mask_scale;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int TOKENS = 16, EACH_WARP = TOKENS / TILE_WARPS, THREADS = 32 * TILE_WARPS;
constexpr int DEPTH = (BOTTLENECK + 15) / 16 * 16;  // of the product, filled up with zeros
// eight elements more than there are, so that neighbouring rows lie in different banks
constexpr int PITCH = DEPTH + 8, INNER_PITCH = D_MODEL + 8;
constexpr int COPY = 8;  // elements
static_assert((D_MODEL * PITCH + 2 * TOKENS * PITCH + TOKENS * INNER_PITCH) * 2 == SHARED_BYTES,
              "the launcher asks for this much shared memory");

// Rows of BOTTLENECK elements into shared memory, zeros behind them and in rows from `valid` on.
template <int ROWS>
DEVICE void load_factor(ACT* shared, const ACT* global, int row_stride, int valid) {
  constexpr int TOTAL = ROWS * (DEPTH / COPY);
#pragma unroll 2
  for (int first = 0; first < TOTAL; first += THREADS) {
    const int i = first + threadIdx.x, r = i / (DEPTH / COPY), k = i % (DEPTH / COPY) * COPY;
    const bool wanted = r < valid && k < BOTTLENECK;
    if (TOTAL % THREADS == 0 || i < TOTAL)
      copy_async_if<2 * COPY>(shared + r * PITCH + k,
                              global + (wanted ? product(r, row_stride) + k : 0), wanted);
  }
}

DEVICE u32 pair_at(const ACT* two) { return *(const u32*)two; }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    prompt_up_norm_forward(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  ACT* const up = (ACT*)shared;
  ACT* const middle = up + D_MODEL * PITCH;  // of this tile and the next one
  ACT* const inner = middle + 2 * TOKENS * PITCH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = (args.tokens + TOKENS - 1) / TOKENS;
  const auto load_middle = [&](int tile, int place) {
    const int first = tile * TOKENS;
    load_factor<TOKENS>(middle + place * TOKENS * PITCH,
                        args.joint + (i64)first * args.joint_row + D_MODEL, args.joint_row,
                        args.tokens - first);
    copies_commit();
  };
  RowOf<ACT> x[EACH_WARP], cross[EACH_WARP];
  RowOf<RESIDUAL_T> residual[EACH_WARP];
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int j = 0; j < EACH_WARP; j++) {
      const i64 token = min(tile * TOKENS + j * TILE_WARPS + warp, args.tokens - 1);
      x[j].fetch(args.x + token * D_MODEL, lane);
      cross[j].fetch(args.joint + token * args.joint_row, lane);
      residual[j].fetch(args.residual + token * D_MODEL, lane);
    }
  };
  fetch(blockIdx.x);
  load_factor<D_MODEL>(up, args.up, BOTTLENECK, D_MODEL);
  load_middle(blockIdx.x, 0);
  int place = 0, next;
  for (int tile = blockIdx.x; tile < tiles; tile = next, place ^= 1) {
    next = tile + gridDim.x;
    copies_wait<0>();
    __syncthreads();
    if (next < tiles) load_middle(next, place ^ 1);

    const int row = lane / 4, pair = lane % 4 * 2;
    u32 a[DEPTH / 16][4];
#pragma unroll
    for (int s = 0; s < DEPTH / 16; s++)
#pragma unroll
      for (int part = 0; part < 4; part++)
        a[s][part] = pair_at(middle + (place * TOKENS + row + part % 2 * 8) * PITCH + s * 16 +
                             part / 2 * 8 + pair);
#pragma unroll
    for (int share = 0; share < D_MODEL; share += 8 * TILE_WARPS) {
      const int first = share + 8 * warp, column = first + pair;
      if (D_MODEL % (8 * TILE_WARPS) != 0 && first >= D_MODEL) break;
      const u32 bias = pair_at(args.up_bias + column);
      float c[4] = {0.f, 0.f, 0.f, 0.f}, b0, b1;
      const ACT* factor = up + (first + row) * PITCH + pair;
#pragma unroll
      for (int s = 0; s < DEPTH / 16; s++)
        mma_16(ACT{}, c, a[s][0], a[s][1], a[s][2], a[s][3], pair_at(factor + s * 16),
               pair_at(factor + s * 16 + 8));
      widen_pair(ACT{}, bias, b0, b1);
      ACT* const to = inner + row * INNER_PITCH + column;
      *(u32*)to = narrow_pair(ACT{}, c[0] + b0, c[1] + b1);
      *(u32*)(to + 8 * INNER_PITCH) = narrow_pair(ACT{}, c[2] + b0, c[3] + b1);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH_WARP; j++) {
      const int of_tile = j * TILE_WARPS + warp, token = tile * TOKENS + of_tile;
      if (token >= args.tokens) continue;
      const ACT* const of_inner = inner + of_tile * INNER_PITCH;
      if constexpr (KEEPS_INNER) {
        RowOf<ACT> kept;
        kept.fetch(of_inner, lane);
        kept.write(args.inner + (i64)token * D_MODEL, lane);
      }
      const RowAt<ACT> at_inner{of_inner, lane};
      prompt_and_normalise(args, token, lane, x[j], cross[j], at_inner, residual[j]);
    }
    if (next < tiles) fetch(next);
  }
}
