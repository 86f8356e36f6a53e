// The gradient of the convolution's input, with the product that comes before it: 16-bit tensors.
//
//   d u  = given d u + d x_dbl x_proj      the product on the tensor cores, the sum in float32
//   d x  = conv_backward(d u)              see conv.cu
//
// so d u is read once, and its sum is neither written nor rounded.
//
// A block is WARPS x 32 channels of one image and walks along `chunk` tokens in tiles of 16. What a
// tile needs arrives by asynchronous copies, STAGES - 1 tiles ahead. Each warp keeps its part of
// x_proj in registers as operands, starts its sums from d u, and hands them to its lanes, one channel
// each, through shared memory.
//
// Macros: ACT, W_T, BIAS_T, TAPS, DIRECTIONS, REVERSED (of direction 0), HAS_BIAS, D_INNER (a
// multiple of 32 WARPS), ROW (of x_dbl, a multiple of 8), WARPS, STAGES, BLOCKS_PER_SM, SHARED_BYTES.
#define PACK 1
#include "conv.cuh"

struct Args {
  const ACT* x;         // [token][2 D_INNER], the first half
  const W_T* weight[2];
  const BIAS_T* bias[2];
  const ACT* du;        // [direction][token][channel]
  const ACT* d_row;     // [direction][token][ROW]: the gradient of x_dbl
  const ACT* x_proj;    // [direction][ROW][channel]
  ACT* dx;              // like x
  int length, chunk;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int TILE = 16, THREADS = 32 * WARPS, WIDTH = 32 * WARPS;
constexpr int X_ROW = 2 * D_INNER;
constexpr int PAIRS = (ROW + 31) / 32;  // of the instruction's 16 products, padded with zeros
using Four = Pack<ACT, 4>;

struct alignas(16) Stage {
  // rows of 4 WARPS and of 4 PAIRS times 16 bytes, see place_du and place_row
  uint4 du[DIRECTIONS][TILE * 4 * WARPS], row[DIRECTIONS][TILE * 4 * PAIRS];
  ACT x[TILE * WIDTH];
};
struct alignas(16) Block {
  Stage stage[STAGES];
  float4 sums[WARPS][DIRECTIONS][144];  // two tokens of two channels each, see pair_of_tokens
};
static_assert(sizeof(Block) <= SHARED_BYTES, "the launcher asks for too little shared memory");

// Where 16 bytes of a row lie: so that what a warp reads at once fills different banks.
DEVICE int place_du(int r, int c) {
  return r * 4 * WARPS + (c ^ (r & (WARPS % 2 ? 2 : 6)));  // read: 4 bytes x 2 of every second row
}
DEVICE int place_row(int r, int c) {
  return r * 4 * PAIRS + (PAIRS % 2 ? c : c ^ (r % 2 * 4));  // read: 64 bytes of neighbouring rows
}
// Where the sums of a pair of tokens begin, of all 16 pairs of channels; likewise.
DEVICE int pair_of_tokens(int n, int q) { return 72 * n + 17 * q + q / 2 * 2; }

// The asynchronous copies of a thread: rows r and r + 8 of du and x, its share of d_row's.
struct Copies {
  static constexpr int SHARE = TILE * 4 * PAIRS, TURNS = (SHARE + THREADS - 1) / THREADS;
  const ACT *du, *x, *row;  // of the tile that comes next
  i64 apart;                // tokens from one direction to the other
  int s, reach, reach_x;    // the next tile's first step, where du and x end

  DEVICE Copies(const Args& args, int start, int end, int first) {
    const int r = threadIdx.x / (4 * WARPS), c = threadIdx.x % (4 * WARPS);
    const i64 token = (i64)blockIdx.z * args.length + start;
    s = start, reach = min(end + REACH, args.length), reach_x = min(end + 2 * REACH, args.length);
    du = args.du + (token + r) * D_INNER + first + c * 8;
    x = args.x + (token + r + REACH) * X_ROW + first + c * 8;
    row = args.d_row + token * ROW;
    apart = (i64)gridDim.z * args.length;
  }

  DEVICE void next(Stage& stage) {
#pragma unroll
    for (int turn = 0; turn < 2; turn++) {
      const int r = threadIdx.x / (4 * WARPS) + 8 * turn, c = threadIdx.x % (4 * WARPS);
      const bool there = s + r >= 0 && s + r < reach;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
        copy_async_if<16>(&stage.du[k][place_du(r, c)], du + (k * apart + 8 * turn) * D_INNER,
                          there);
      copy_async_if<16>(stage.x + r * WIDTH + c * 8, x + 8 * turn * X_ROW,
                        s + r + REACH >= 0 && s + r + REACH < reach_x);
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int i = turn * THREADS + threadIdx.x, r = i / (4 * PAIRS), c = i % (4 * PAIRS);
      if (SHARE % THREADS && i >= SHARE) continue;
      const bool there = s + r >= 0 && s + r < reach && c < ROW / 8;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
        copy_async_if<16>(&stage.row[k][place_row(r, c)], row + (k * apart + r) * ROW + c * 8,
                          there);
    }
    du += TILE * D_INNER, x += TILE * X_ROW, row += TILE * ROW, s += TILE;
  }
};

// The transposed x_proj of a warp as left operands: 32 channels in two of 16. Which of the 16
// products a lane holds is free as long as both operands agree: lane q of a quad takes 8 neighbours
// of each 32, for the right operand 16 bytes. Rows g and g + 8 of operand m are channels 4 g + 2 m
// and the one after, so that the lanes of quad g have channels 4 g .. 4 g + 3.
struct Projection {
  u32 operand[DIRECTIONS][PAIRS][2][2][4];  // [..][half of the 8 neighbours][m]

  DEVICE Projection(const ACT* x_proj, int first, int lane) {
    const ACT* from = x_proj + first + lane / 4 * 4;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++)
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        const int row = pair * 32 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          Four low, high;
#pragma unroll
          for (int p = 0; p < 4; p++) low.v[p] = high.v[p] = narrowed<ACT>(0.f);
          if (row < ROW) {
            const ACT* at = from + (k * ROW + row + 2 * i) * D_INNER;
            low = *(const Four*)at;
            high = *(const Four*)(at + D_INNER);
          }
#pragma unroll
          for (int p = 0; p < 4; p++)
            operand[k][pair][i / 2][p / 2][i % 2 * 2 + p % 2] =
                low.v[p].bits | (u32)high.v[p].bits << 16;
        }
      }
  }

  // The whole gradient of u for a tile, this warp's channels.
  DEVICE void apply(const Stage& stage, float4 (*sums)[144], int warp, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      float c[2][2][4];  // [m][n][channel of m, token of 8 n + 2 q, + 1]
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = place_du(i / 2 * 8 + 2 * q + i % 2, warp * 4 + g / 2);
        const Four du = ((const Four*)&stage.du[k][at])[g % 2];
#pragma unroll
        for (int p = 0; p < 4; p++) c[p / 2][i / 2][p % 2 * 2 + i % 2] = widen(du.v[p]);
      }
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const uint4 b = stage.row[k][place_row(n * 8 + g, pair * 4 + q)];
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const u32(*a)[2][4] = operand[k][pair];
            mma_16(ACT{}, c[m][n], a[0][m][0], a[0][m][1], a[0][m][2], a[0][m][3], b.x, b.y);
            mma_16(ACT{}, c[m][n], a[1][m][0], a[1][m][1], a[1][m][2], a[1][m][3], b.z, b.w);
          }
        }
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
          sums[k][pair_of_tokens(n, q) + 2 * g + m] =
              make_float4(c[m][n][0], c[m][n][1], c[m][n][2], c[m][n][3]);
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
  const int start = begin - REACH, tiles = (end + REACH - start + TILE - 1) / TILE;
  Copies copies(args, start, end, first);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < tiles) copies.next(block.stage[i]);
    copies_commit();
  }

  const Projection projection(args.x_proj, first + warp * 32, lane);
  const Taps taps(args, channel);
  const ACT* x = args.x + (i64)blockIdx.z * length * X_ROW + channel;
  ACT* dx = args.dx + ((i64)blockIdx.z * length + start - REACH) * X_ROW + channel;
  float window[WINDOW][1], slopes[DIRECTIONS][WINDOW][1];  // slopes: d pre_{s - 2 REACH} .. s
#pragma unroll
  for (int i = 0; i < WINDOW; i++) {
    const int t = start - REACH + i - 1;
    window[i][0] = i > 0 && t >= 0 && t < length ? widen(x[(i64)t * X_ROW]) : 0.f;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) slopes[k][i][0] = 0.f;
  }
  const float2* own = (const float2*)(block.sums[warp][0] + lane / 2) + lane % 2;

  for (int tile = 0; tile < tiles; tile++) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and the one before is done with
    const int ahead = tile + STAGES - 1;
    if (ahead < tiles) copies.next(block.stage[ahead % STAGES]);
    copies_commit();
    const Stage& stage = block.stage[tile % STAGES];
    projection.apply(stage, block.sums[warp], warp, lane);
    __syncwarp();
    const int t0 = start + tile * TILE - REACH;
    float2 grad[DIRECTIONS];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      const int t = t0 + i;
      shift<WINDOW>(window);
      window[WINDOW - 1][0] = widen(stage.x[i * WIDTH + threadIdx.x]);
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++) {
        if (i % 2 == 0) grad[k] = own[2 * (k * 144 + pair_of_tokens(i / 8, i / 2 % 4))];
        shift<WINDOW>(slopes[k]);
        const float pre = taps.pre(k, 0, window), g = i % 2 ? grad[k].y : grad[k].x;
        slopes[k][WINDOW - 1][0] = g * silu_slope(pre, sigmoid(pre));
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
