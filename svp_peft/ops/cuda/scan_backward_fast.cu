// The gradients of the selective scan in two sweeps without any stored state: 16-bit tensors.
//
// With the adjoint g_t = dLoss/dh_t, what d dt needs from the states is u_t = a_t g_t h_{t-1}, and that
// telescopes: u_t = u_{t+1} + dy_t C_t h_t - g_t dt_t x_t B_t. Summed over states with the weights A,
//
//   U_t = sum_n A_n u_tn = sum_{s >= t} (G_s - R_s)     G_s = dy_s sum_n A_n C_sn h_sn
//                                                       R_s = dt_s x_s sum_n A_n B_sn g_sn
//
// so state and adjoint need never meet. Sweep 1 (scan order) computes h, dC, dz and leaves G_t and dt_t
// in `stash`; sweep 2 (reverse) computes g, dB, dx and d dt. Both take the same a_t to the bit:
// otherwise the sums would not cancel where they must.
//
// dA_n = sum_t dt_t u_tn is summed by tiles, so that nothing large has to cancel. With S_s the sum of
// dt from the tile's first step to s, T that of the whole tile, and `next` the step after it,
//
//   sum over the tile of dt_t u_tn = sum_s S_s (dy_s C_sn h_sn - g_sn dt_s x_s B_sn) + T u_next,n
//
// where u_next,n is the adjoint that sweep 2 brings along times the state that sweep 1 left behind.
// With those states at hand U_t starts anew at every tile as well: its rounding errors, harmless in
// d dt, would all have one sign in the gradient of dt_bias.
//
// A block is WARPS x 32 channels of one direction of one image. Sums over channels (dB, dC) go through
// the tensor cores and shared memory to one partial sum per block; reduce.cu adds those up.
//
// More macros: WARPS, BLOCKS_PER_SM, UNROLL, NEED_U, NEED_DT, NEED_B, NEED_C, NEED_Z, NEED_A, NEED_D,
// NEED_BIAS. D_INNER is a multiple of 32 * WARPS, D_STATE 8 or 16, COPY_TILE 16.
#include "scan.cuh"

struct Args {
  ScanInputs in;
  const ACT *grad_out, *y;
  ACT *du[2], *ddt[2], *dz;
  float *dB, *dC;          // [part][direction][image][token][state]
  float2* stash;           // [direction][image][step, padded to whole tiles][channel]: G, dt
  float* states;           // [direction][image][tile][D_STATE + 1][channel]: h before the tile, T;
                           // for dA and dt_bias
  float *dA, *dD, *dbias;  // [image][direction][channel]([state])
  int dz_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int STEPS = UNROLL;  // pragmas take no macros
constexpr bool KEEP_STATES = NEED_A || NEED_BIAS;

struct alignas(16) Stage {
  // what a step has read here it replaces by its results: dz in g; then du in u, d dt in g
  ACT u[TILE_ELEMENTS], z[HAS_Z ? TILE_ELEMENTS : 8], g[TILE_ELEMENTS];
  union {
    struct {  // sweep 1
      ACT y[NEED_Z ? TILE_ELEMENTS : 8];
#if RANK > 0
      ACT low[TILE * RANK_PITCH];
#else
      ACT raw_dt[TILE_ELEMENTS];
#endif
    };
    float2 stash[TILE_ELEMENTS];  // sweep 2
  };
};
struct alignas(16) Warp {
  Stage stage[2];
#if RANK > 0
  StepProjection projection;
#endif
  float dt[TILE * 33];
};
struct alignas(16) Block {
  Warp warps[WARPS];
  ACT staged_B[2][TILE * D_STATE], staged_C[2][TILE * D_STATE];
  float B[TILE * D_STATE], C[TILE * D_STATE];
  float4 sums[WARPS][TILE][33];  // per step: 8 quads x 16 states; one more to spread the banks
};

static_assert(sizeof(Block) <= SHARED_BYTES, "the launcher asks for too little shared memory");

// Adds the 8 quads x WARPS of every step and state of a tile. Four lanes share the rows of four states
// of one step; two exchanges leave each of them with one finished sum.
DEVICE void add_up(const Block& block, float* to, int s, int step, int length, bool back, int warp,
                   int lane) {
#pragma unroll
  for (int turn = 0; turn < 4 / WARPS; turn++) {
    const int i = (turn * WARPS + warp) * 2 + lane / 16, j = lane / 4 % 4, q = lane % 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int row = 0; row < 2 * WARPS; row++) {
      const float4 v = block.sums[row / 2][i][(row % 2 * 4 + j) * 4 + q];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const bool upper = j & 2, odd = j & 1;
    float a = upper ? sum.z : sum.x, b = upper ? sum.w : sum.y;
    a += __shfl_xor_sync(~0u, upper ? sum.x : sum.z, 8);
    b += __shfl_xor_sync(~0u, upper ? sum.y : sum.w, 8);
    const float total = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 4);
    const int at = s + step * i, n = q * 4 + j;
    if (at < length && n < D_STATE) to[token_of(at, length, back) * D_STATE + n] = total;
  }
}

// One copy of the code serves both directions: two would not fit the instruction cache.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    scan_backward_fast(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  Block& block = *(Block*)shared;
  const ScanInputs& in = args.in;
  constexpr int PARTS = D_INNER / (CHANNELS * WARPS);
  const int part = blockIdx.x % PARTS, unit = blockIdx.x / PARTS;
  const int direction = unit % DIRECTIONS, image = unit / DIRECTIONS;
  const bool back = is_reversed(direction), writes_dz = NEED_Z && direction == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Warp& self = block.warps[warp];
  const int length = in.length, padded = (length + TILE - 1) / TILE * TILE;
  const int first = (part * WARPS + warp) * CHANNELS, channel = first + lane;

  const i64 origin = (i64)image * length;  // the image's first token
  const ACT* u = in.u[direction] + origin * in.u_row + first;
  const ACT* dt = in.dt[direction] + origin * in.dt_row + (RANK ? 0 : first);
  const ACT* B = in.B[direction] + origin * in.b_row;
  const ACT* C = in.C[direction] + origin * in.c_row;
  const ACT* z = HAS_Z ? in.z + origin * in.z_row + first : nullptr;
  const ACT* grad_out = args.grad_out + origin * D_INNER + first;
  const ACT* y = NEED_Z ? args.y + origin * D_INNER + first : nullptr;
  const i64 row = ((i64)part * DIRECTIONS + direction) * in.batch + image;
  float* sums_B = NEED_B ? args.dB + row * length * D_STATE : nullptr;
  float* sums_C = NEED_C ? args.dC + row * length * D_STATE : nullptr;

  float rate[D_STATE], h[D_STATE], dA[D_STATE];
#pragma unroll
  for (int n = 0; n < D_STATE; n++) {
    rate[n] = decay_rate(in.A[direction], (i64)channel * D_STATE + n);
    h[n] = dA[n] = 0.f;
  }
  const Selector one(lane);
#if RANK > 0
  self.projection.load(in.dt_weight[direction], in.dt_bias[direction], first, D_INNER, lane);
  clear_rank_padding(self.stage[0].low, lane);
  clear_rank_padding(self.stage[1].low, lane);
  __syncwarp();
#else
  const float bias = HAS_BIAS ? widen(in.dt_bias[direction][channel]) : 0.f;
#endif

  RowWalk<COPY_TILE, TILE, CHANNELS, CHANNELS, ACT> walk_u, walk_g, walk_z, walk_y;
  RowWalk<COPY_ROWS, TILE, D_STATE, D_STATE, ACT> walk_BC;
#if RANK > 0
  RowWalk<COPY_ROWS, TILE, RANK, RANK_PITCH, ACT> walk_dt;
#else
  RowWalk<COPY_TILE, TILE, CHANNELS, CHANNELS, ACT> walk_dt;
#endif
  RowWalk<16, TILE, CHANNELS, CHANNELS, float2> walk_stash;
  constexpr int SLOT = (D_STATE + 1) * D_INNER;
  const i64 walk = (i64)direction * in.batch + image;
  float2* stash = args.stash + walk * padded * D_INNER + first;
  // the warps share B and C: one fetches and widens B, another C
  const bool takes_B = warp == 0, takes_C = warp == 1 % WARPS;
  auto start = [&](int s, int step, bool first_sweep) {
    walk_u.start(u, in.u_row, s, step, length, back, lane);
    walk_g.start(grad_out, D_INNER, s, step, length, back, lane);
    if constexpr (HAS_Z) walk_z.start(z, in.z_row, s, step, length, back, lane);
    if constexpr (WARPS > 1)
      walk_BC.start(takes_B ? B : C, takes_B ? in.b_row : in.c_row, s, step, length, back, lane);
    if (first_sweep) {
      walk_dt.start(dt, in.dt_row, s, step, length, back, lane);
      if constexpr (NEED_Z) walk_y.start(y, D_INNER, s, step, length, back, lane);
    } else {
      walk_stash.start(stash, D_INNER, s, step, length, false, lane);
    }
  };
  auto load = [&](int slot, int s, int step, bool first_sweep) {
    Stage& to = self.stage[slot];
    const int low = step < 0 ? s + 1 - length : 0, high = step < 0 ? TILE : length - s;
    walk_u.load(to.u, s, step, low, high, length, lane);
    walk_g.load(to.g, s, step, low, high, length, lane);
    if constexpr (HAS_Z) walk_z.load(to.z, s, step, low, high, length, lane);
    if constexpr (WARPS > 1) {
      ACT* rows = takes_B ? block.staged_B[slot] : block.staged_C[slot];
      if (takes_B || takes_C) walk_BC.load(rows, s, step, low, high, length, lane);
    } else {
      load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(block.staged_B[slot], B, in.b_row, s, step,
                                                   length, back, lane);
      load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(block.staged_C[slot], C, in.c_row, s, step,
                                                   length, back, lane);
    }
    if (first_sweep) {
#if RANK > 0
      walk_dt.load(to.low, s, step, low, high, length, lane);
#else
      walk_dt.load(to.raw_dt, s, step, low, high, length, lane);
#endif
      if (writes_dz) walk_y.load(to.y, s, step, low, high, length, lane);
    } else {
      walk_stash.load(to.stash, s, step, 0, TILE, length, lane);
    }
    copies_commit();
  };
  auto finish_load = [&](int slot) {
    copies_wait<0>();
    __syncwarp();
    if (warp == 0) widen_rows<TILE * D_STATE>(block.B, block.staged_B[slot], lane);
    if (warp == 1 % WARPS) widen_rows<TILE * D_STATE>(block.C, block.staged_C[slot], lane);
  };

  // sweep 1
  float2* keep = stash + lane;
  float* left = KEEP_STATES ? args.states + walk * (padded / TILE) * SLOT + channel : nullptr;
  ACT* dz = NEED_Z ? args.dz + origin * args.dz_row + first : nullptr;
  float prefix = 0.f;  // S_s
  start(0, 1, true);
  load(0, 0, 1, true);
  finish_load(0);
  __syncthreads();
  for (int s = 0, slot = 0; s < padded; s += TILE, slot ^= 1) {
    Stage& stage = self.stage[slot];
    const int inside = length - s;  // steps of this tile that exist
    if (s + TILE < padded) load(slot ^ 1, s + TILE, 1, true);
#if RANK > 0
    self.projection.run(stage.low, self.dt, lane);
#else
#pragma unroll
    for (int i = 0; i < TILE; i++)
      self.dt[i * 33 + lane] = step_size(widen(stage.raw_dt[i * CHANNELS + lane]) + bias);
#endif
    if constexpr (KEEP_STATES) {
      prefix = 0.f;
#pragma unroll
      for (int n = 0; n < D_STATE; n++) left[n * D_INNER] = h[n];
    }
    __syncwarp();
    // a step of size 0 leaves everything as it is
    for (int i = inside; i < TILE; i++) self.dt[i * 33 + lane] = 0.f;
#pragma unroll(STEPS)
    for (int i = 0; i < TILE; i++) {
      const int k = i * CHANNELS + lane;
      const float x = widen(stage.u[k]), d = self.dt[i * 33 + lane], dx = d * x;
      float gy = widen(stage.g[k]) * in.scale;
      if constexpr (HAS_Z) {
        const float gate_in = widen(stage.z[k]), gate = sigmoid(gate_in);
        if constexpr (NEED_Z)  // by either direction, so that their code is one; one of them stores it
          narrow(gy * widen(stage.y[k]) * silu_slope(gate_in, gate), stage.g[k]);
        gy *= gate_in * gate;
      }
      if constexpr (NEED_A) prefix += d;
      const float weight = prefix * gy;
      float product = 0.f, for_C[D_STATE];
#pragma unroll
      for (int n4 = 0; n4 < D_STATE; n4 += 4) {
        const float4 B4 = *(const float4*)(block.B + i * D_STATE + n4);
        const float4 C4 = *(const float4*)(block.C + i * D_STATE + n4);
        const float b[4] = {B4.x, B4.y, B4.z, B4.w}, c[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int n = n4 + j;
          h[n] = fmaf(ex2(d * rate[n]), h[n], dx * b[j]);
          const float read = c[j] * h[n];
          product = fmaf(rate[n], read, product);
          for_C[n] = gy * h[n];
          if constexpr (NEED_A) dA[n] = fmaf(weight, read, dA[n]);
        }
      }
      if constexpr (NEED_C) block.sums[warp][i][lane] = quad_sum<false, D_STATE>(for_C, one);
      *keep = make_float2(gy * product, d);
      keep += D_INNER;
    }
    if constexpr (KEEP_STATES) {
      left[D_STATE * D_INNER] = prefix;
      left += SLOT;
    }
    __syncthreads();
    if (writes_dz)
      store_rows<COPY_TILE, TILE, CHANNELS>(dz, stage.g, args.dz_row, s, 1, length, length, back, lane);
    if constexpr (NEED_C) add_up(block, sums_C, s, 1, length, back, warp, lane);
    if (s + TILE < padded) finish_load(slot ^ 1);
    __syncthreads();
  }

  // sweep 2: h is now a_{t+1} g_{t+1}
#pragma unroll
  for (int n = 0; n < D_STATE; n++) h[n] = 0.f;
  __syncwarp();  // the stash is read by other lanes than wrote it
  start(padded - 1, -1, false);
  load(0, padded - 1, -1, false);
  const float skip = HAS_D ? widen(in.D[direction][channel]) : 0.f;
  float carried = 0.f, dD = 0.f, dbias = 0.f;  // carried: U_t / ln 2
  ACT* du = NEED_U ? args.du[direction] + origin * D_INNER + first : nullptr;
  ACT* ddt = NEED_DT ? args.ddt[direction] + origin * D_INNER + first : nullptr;
  finish_load(0);
  __syncthreads();
  for (int s = padded - 1, slot = 0; s >= 0; s -= TILE, slot ^= 1) {
    Stage& stage = self.stage[slot];
    const int outside = s + 1 - length;  // steps of this tile that do not exist
    if (s > TILE) load(slot ^ 1, s - TILE, -1, false);
    if constexpr (KEEP_STATES) {
      left -= SLOT;
      prefix = left[D_STATE * D_INNER];
      if (s + 1 < padded) {
        carried = 0.f;
#pragma unroll
        for (int n = 0; n < D_STATE; n++) {
          const float u_next = h[n] * left[SLOT + n * D_INNER];
          carried = fmaf(rate[n], u_next, carried);
          dA[n] = fmaf(prefix, u_next, dA[n]);
        }
      }
    }
#pragma unroll(STEPS)
    for (int i = 0; i < TILE; i++) {
      const int k = i * CHANNELS + lane;
      const float G = stage.stash[k].x, d = stage.stash[k].y;
      const float x = widen(stage.u[k]), dx = d * x;
      float gy = widen(stage.g[k]) * in.scale;
      if constexpr (HAS_Z) {
        const float gate_in = widen(stage.z[k]);
        gy *= gate_in * sigmoid(gate_in);
      }
      const float weight = -prefix * dx;
      float dot_B = 0.f, product = 0.f, for_B[D_STATE];
#pragma unroll
      for (int n4 = 0; n4 < D_STATE; n4 += 4) {
        const float4 B4 = *(const float4*)(block.B + i * D_STATE + n4);
        const float4 C4 = *(const float4*)(block.C + i * D_STATE + n4);
        const float b[4] = {B4.x, B4.y, B4.z, B4.w}, c[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int n = n4 + j;
          const float g = fmaf(gy, c[j], h[n]), read = b[j] * g;
          dot_B += read;
          product = fmaf(rate[n], read, product);
          for_B[n] = dx * g;
          h[n] = g * ex2(d * rate[n]);
          if constexpr (NEED_A) dA[n] = fmaf(weight, read, dA[n]);
        }
      }
      if constexpr (NEED_B) block.sums[warp][i][lane] = quad_sum<false, D_STATE>(for_B, one);
      carried += G - dx * product;
      float grad_dt = fmaf(LN2, carried, x * dot_B);
      if constexpr (SOFTPLUS) grad_dt *= softplus_slope<false>(d);
      if constexpr (NEED_U) narrow(fmaf(skip, gy, d * dot_B), stage.u[k]);
      if constexpr (NEED_DT) narrow(grad_dt, stage.g[k]);
      if constexpr (NEED_D) dD = fmaf(gy, x, dD);
      if constexpr (NEED_BIAS) dbias += i < outside ? 0.f : grad_dt;
      if constexpr (NEED_A) prefix -= d;
    }
    __syncthreads();
    if constexpr (NEED_U)
      store_rows<COPY_TILE, TILE, CHANNELS>(du, stage.u, D_INNER, s, -1, length, length, back, lane);
    if constexpr (NEED_DT)
      store_rows<COPY_TILE, TILE, CHANNELS>(ddt, stage.g, D_INNER, s, -1, length, length, back, lane);
    if constexpr (NEED_B) add_up(block, sums_B, s, -1, length, back, warp, lane);
    if (s > TILE) finish_load(slot ^ 1);
    __syncthreads();
  }

  const i64 mine = ((i64)image * DIRECTIONS + direction) * D_INNER + channel;
  if constexpr (NEED_A) {
#pragma unroll
    for (int n = 0; n < D_STATE; n++)
      // A = -exp(A_log) has itself as its derivative; rate holds A * log2(e)
      args.dA[mine * D_STATE + n] = dA[n] * (A_IS_LOG ? rate[n] * LN2 : 1.f);
  }
  if constexpr (NEED_D) args.dD[mine] = dD;
  if constexpr (NEED_BIAS) args.dbias[mine] = dbias;
}
