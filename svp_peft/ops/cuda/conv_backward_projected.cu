// The gradient of the convolution's input, with the product that comes before it: 16-bit tensors.
//
//   d u  = given d u + d x_dbl x_proj      the product on the tensor cores, the sum in float32
//   d x  = conv_backward(d u)              see conv.cu
//
// so d u is read once, and its sum is neither written nor rounded.
//
// A block is WARPS x 32 channels of one image and walks along `chunk` tokens in tiles of 16. What a tile
// needs arrives by asynchronous copies, STAGES - 1 tiles ahead. Each warp keeps its part of x_proj in
// registers as operands, starts its sums from d u, and hands them to its lanes, one channel each,
// through shared memory.
//
// Macros: ACT, W_T, BIAS_T, TAPS, DIRECTIONS, REVERSED (of direction 0), HAS_BIAS, D_INNER (a multiple
// of 32 WARPS), ROW (of x_dbl, a multiple of 8), WARPS, STAGES, BLOCKS_PER_SM, SHARED_BYTES.
#define PACK 1
#include "conv.cuh"

struct Args {
  const ACT* x;         // [token][2 D_INNER], the first half
  const W_T* weight[2];
  const BIAS_T* bias[2];
  const ACT* du[2];     // [token][channel]
  const ACT* d_row[2];  // [token][ROW]: the gradient of x_dbl
  const ACT* x_proj;    // [direction][ROW][channel]
  ACT* dx;              // like x
  int length, chunk;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int TILE = 16, THREADS = 32 * WARPS, WIDTH = 32 * WARPS;
constexpr int PAIRS = (ROW + 31) / 32;  // of the instruction's 16 products, padded with zeros
constexpr int X_ROW = 2 * D_INNER;
constexpr int PITCH = 36 * DIRECTIONS;  // 32 sums per direction; four more to spread the banks
using Eight = Pack<ACT, 8>;

struct alignas(16) Stage {
  Eight du[DIRECTIONS][TILE * 4 * WARPS], row[DIRECTIONS][TILE * 4 * PAIRS];  // see `place`
  ACT x[TILE * WIDTH];
};
struct alignas(16) Block {
  Stage stage[STAGES];
  float sums[WARPS][TILE * PITCH];
};
static_assert(sizeof(Block) <= SHARED_BYTES, "the launcher asks for too little shared memory");

// Where 16 bytes of a row of COLUMNS x 16 lie: two rows side by side fill other banks.
template <int COLUMNS> DEVICE int place(int row, int column) {
  return row * COLUMNS + (COLUMNS % 8 ? column : column ^ (row % 2 * 4));
}
// Where the j-th four sums of lane q of a quad lie in a row, in units of four. Its 8 channels make
// 2 DIRECTIONS such units, a channel's directions side by side.
DEVICE int unit_of(int q, int j) {
  return DIRECTIONS == 2 ? 4 * q + (j ^ q / 2) : 2 * q + j;
}

// What the block's tokens are and where its columns begin.
struct Walk {
  i64 image;  // first token
  int first, begin, end, length;

  DEVICE void load(Stage& stage, const Args& args, int s0) const {
    const int reach = min(end + REACH, length), reach_x = min(end + 2 * REACH, length);
#pragma unroll
    for (int turn = 0; turn < TILE * 4 * WARPS / THREADS; turn++) {
      const int i = turn * THREADS + threadIdx.x, r = i / (4 * WARPS), c = i % (4 * WARPS);
      const int s = s0 + r, t = s + REACH;
      const i64 at = (image + s) * D_INNER + first + c * 8;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
        copy_async_if<16>(&stage.du[k][place<4 * WARPS>(r, c)], args.du[k] + at,
                          s >= 0 && s < reach);
      copy_async_if<16>(stage.x + r * WIDTH + c * 8,
                        args.x + (image + t) * X_ROW + first + c * 8, t >= 0 && t < reach_x);
    }
    constexpr int COPIES = TILE * 4 * PAIRS;
#pragma unroll
    for (int turn = 0; turn < (COPIES + THREADS - 1) / THREADS; turn++) {
      const int i = turn * THREADS + threadIdx.x;
      if (COPIES % THREADS && i >= COPIES) continue;
      const int r = i / (4 * PAIRS), c = i % (4 * PAIRS), s = s0 + r;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
        copy_async_if<16>(&stage.row[k][place<4 * PAIRS>(r, c)],
                          args.d_row[k] + (image + s) * ROW + c * 8,
                          s >= 0 && s < reach && c < ROW / 8);
    }
  }
};

// The x_proj of a warp as right operands. Which of the 16 products a lane holds is free as long as both
// operands agree: lane q of a quad takes 8 neighbours of each 32, for the left operand 16 bytes. Column
// g of the n-th operand is channel 4 g + n, so that a lane ends up with 8 neighbouring channels.
struct Projection {
  u32 operand[DIRECTIONS][PAIRS][4][4];  // [..][two of the 8 neighbours][n]

  DEVICE Projection(const ACT* x_proj, int first, int lane) {
    const ACT* from = x_proj + first + lane / 4 * 4;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++)
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        const int row = pair * 32 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          Pack<ACT, 4> low, high;
#pragma unroll
          for (int n = 0; n < 4; n++) low.v[n] = high.v[n] = narrowed<ACT>(0.f);
          if (row < ROW) {
            const ACT* at = from + (i64)(k * ROW + row + 2 * i) * D_INNER;
            low = *(const Pack<ACT, 4>*)at;
            high = *(const Pack<ACT, 4>*)(at + D_INNER);
          }
#pragma unroll
          for (int n = 0; n < 4; n++)
            operand[k][pair][i][n] = low.v[n].bits | (u32)high.v[n].bits << 16;
        }
      }
  }

  // The whole gradient of u for a tile, this warp's channels.
  DEVICE void apply(const Stage& stage, float* sums, int warp, int lane) const {
    const int g = lane / 4, q = lane % 4;
    float c[DIRECTIONS][4][4];  // [..][n][row g: channels 8 q + n, + 4; row g + 8: the same]
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Eight du = stage.du[k][place<4 * WARPS>(g + half * 8, warp * 4 + q)];
#pragma unroll
        for (int i = 0; i < 8; i++) c[k][i % 4][half * 2 + i / 4] = widen(du.v[i]);
      }
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        const uint4 low = *(const uint4*)&stage.row[k][place<4 * PAIRS>(g, pair * 4 + q)];
        const uint4 high = *(const uint4*)&stage.row[k][place<4 * PAIRS>(g + 8, pair * 4 + q)];
        const auto& b = operand[k][pair];
#pragma unroll
        for (int n = 0; n < 4; n++)
          mma_16(ACT{}, c[k][n], low.x, high.x, low.y, high.y, b[0][n], b[1][n]);
#pragma unroll
        for (int n = 0; n < 4; n++)
          mma_16(ACT{}, c[k][n], low.z, high.z, low.w, high.w, b[2][n], b[3][n]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < 2 * DIRECTIONS; j++) {
        float four[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = (4 * j + e) / DIRECTIONS;  // of the 8 channels
          four[e] = c[e % DIRECTIONS][i % 4][half * 2 + i / 4];
        }
        *(float4*)(sums + (g + half * 8) * PITCH + 4 * unit_of(q, j)) =
            make_float4(four[0], four[1], four[2], four[3]);
      }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    conv_backward_projected(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  Block& block = *(Block*)shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = args.length;
  const int begin = blockIdx.y * args.chunk, end = min(begin + args.chunk, length);
  const int first = blockIdx.x * WIDTH, channel = first + threadIdx.x;
  const Walk walk{(i64)blockIdx.z * length, first, begin, end, length};
  const int start = begin - REACH, tiles = (end + REACH - start + TILE - 1) / TILE;
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < tiles) walk.load(block.stage[i], args, start + i * TILE);
    copies_commit();
  }

  const Projection projection(args.x_proj, first + warp * 32, lane);
  const Taps taps(args, channel);
  const ACT* x = args.x + walk.image * X_ROW + channel;
  ACT* dx = args.dx + (walk.image + start - REACH) * X_ROW + channel;
  float window[WINDOW][1], slopes[DIRECTIONS][WINDOW][1];  // slopes: d pre_{s - 2 REACH} .. s
#pragma unroll
  for (int i = 0; i < WINDOW; i++) {
    const int t = start - REACH + i - 1;
    window[i][0] = i > 0 && t >= 0 && t < length ? widen(x[(i64)t * X_ROW]) : 0.f;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) slopes[k][i][0] = 0.f;
  }
  float* sums = block.sums[warp];
  const int mine = lane * DIRECTIONS, owner = lane / 8;  // which lane of a quad had this channel
  const float* own = sums + 4 * unit_of(owner, mine / 4 - owner * 2 * DIRECTIONS) + mine % 4;

  for (int tile = 0; tile < tiles; tile++) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and the one before is done with
    const int ahead = tile + STAGES - 1;
    if (ahead < tiles) walk.load(block.stage[ahead % STAGES], args, start + ahead * TILE);
    copies_commit();
    const Stage& stage = block.stage[tile % STAGES];
    projection.apply(stage, sums, warp, lane);
    __syncwarp();
    const int s0 = start + tile * TILE;
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      const int t = s0 + i - REACH;
      shift<WINDOW>(window);
      window[WINDOW - 1][0] = widen(stage.x[i * WIDTH + threadIdx.x]);
      const Pack<float, DIRECTIONS> grad = *(const Pack<float, DIRECTIONS>*)(own + i * PITCH);
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++) {
        shift<WINDOW>(slopes[k]);
        const float pre = taps.pre(k, 0, window);
        slopes[k][WINDOW - 1][0] = grad.v[k] * silu_slope(pre, sigmoid(pre));
      }
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
          // slopes[REACH] belongs to token t
          const int at = is_reversed(k) ? REACH - (REACH - j) : REACH + (REACH - j);
          sum = fmaf(taps.weight[k][j][0], slopes[k][at][0], sum);
        }
      // what precedes the first token is all in the first tile
      if ((i >= 2 * REACH || t >= begin) && t < end) dx[i * X_ROW] = narrowed<ACT>(sum);
    }
    dx += TILE * X_ROW;
  }
}
