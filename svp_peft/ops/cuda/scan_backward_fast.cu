// The gradients of the selective scan in two sweeps without any stored state: 16-bit tensors.
//
// With the adjoint g_t = dLoss/dh_t, what d dt needs from the states is u_t = a_t g_t h_{t-1}, and that
// telescopes: u_t = u_{t+1} + dy_t C_t h_t - g_t dt_t x_t B_t. Summed over states with the weights A,
//
//   U_t = sum_n A_n u_tn = sum_{s >= t} (G_s - R_s)     G_s = dy_s sum_n A_n C_sn h_sn
//                                                       R_s = dt_s x_s sum_n A_n B_sn g_sn
//
// so state and adjoint need never meet. Sweep 1 (scan order) computes h, dC, dz and leaves G_t and dt_t
// in `stash`; sweep 2 (reverse) computes g, dB, dx and d dt. Likewise dA_n = sum_t dt_t u_tn
// = sum_s S_s (dy_s C_sn h_sn - g_sn dt_s x_s B_sn) with S_s = dt_0 + .. + dt_s. Both sweeps take the
// same a_t to the bit: otherwise the sums would not cancel where they must.
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
  float *dA, *dD, *dbias;  // [image][direction][channel]([state])
  int dz_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

struct alignas(16) Stage {
  ACT u[TILE_ELEMENTS], z[HAS_Z ? TILE_ELEMENTS : 8], g[TILE_ELEMENTS];
  ACT B[TILE * D_STATE], C[TILE * D_STATE];
#if RANK > 0
  ACT low[TILE * RANK_PITCH];
#else
  ACT dt[TILE_ELEMENTS];
#endif
  ACT y[NEED_Z ? TILE_ELEMENTS : 8];
};
struct alignas(16) Warp {
  Stage stage[2];
  float B[TILE * D_STATE], C[TILE * D_STATE];
#if RANK > 0
  StepProjection projection;
  float dt[TILE * 33];
#endif
};
constexpr int STEPS = UNROLL;  // pragmas take no macros
struct alignas(16) Block {
  Warp warps[WARPS];
  float4 sums[WARPS][TILE][33];  // per step: 8 quads x 16 states; one more to spread the banks
};

DEVICE void block_sync() {
  if constexpr (WARPS == 1)
    __syncwarp();
  else
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    scan_backward_fast(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  Block& block = *(Block*)shared;
  const ScanInputs& in = args.in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Warp& self = block.warps[warp];
  constexpr int PARTS = D_INNER / (CHANNELS * WARPS);
  const int length = in.length, padded = (length + TILE - 1) / TILE * TILE;
  const int part = blockIdx.x % PARTS, unit = blockIdx.x / PARTS;
  const int direction = unit % DIRECTIONS, image = unit / DIRECTIONS;
  const int first = (part * WARPS + warp) * CHANNELS, channel = first + lane;
  const bool back = is_reversed(direction);

  const i64 origin = (i64)image * length;  // the image's first token
  const ACT* u = in.u[direction] + origin * in.u_row + first;
  const ACT* dt = in.dt[direction] + origin * in.dt_row + (RANK ? 0 : first);
  const ACT* B = in.B[direction] + origin * in.b_row;
  const ACT* C = in.C[direction] + origin * in.c_row;
  const ACT* z = HAS_Z ? in.z + origin * in.z_row + first : nullptr;
  const ACT* grad_out = args.grad_out + origin * D_INNER + first;
  const ACT* y = NEED_Z ? args.y + origin * D_INNER + first : nullptr;
  const bool writes_dz = NEED_Z && direction == 0;

  float rate[D_STATE], h[D_STATE], dA[D_STATE];
#pragma unroll
  for (int n = 0; n < D_STATE; n++) {
    rate[n] = decay_rate(in.A[direction], (i64)channel * D_STATE + n);
    h[n] = dA[n] = 0.f;
  }
  const Selector one(lane);
  float prefix = 0.f;  // S_s
#if RANK > 0
  self.projection.load(in.dt_weight[direction], in.dt_bias[direction], first, D_INNER, lane);
  clear_rank_padding(self.stage[0].low, lane);
  clear_rank_padding(self.stage[1].low, lane);
  __syncwarp();
#else
  const float bias = HAS_BIAS ? widen(in.dt_bias[direction][channel]) : 0.f;
#endif

  auto load_tile = [&](ACT* to, const ACT* from, int row, int s, int step) {
    load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to, from, row, s, step, length, back, lane);
  };
  auto load = [&](Stage& to, int s, int step, bool first_sweep) {
    load_tile(to.u, u, in.u_row, s, step);
    load_tile(to.g, grad_out, D_INNER, s, step);
    if constexpr (HAS_Z) load_tile(to.z, z, in.z_row, s, step);
    load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(to.B, B, in.b_row, s, step, length, back, lane);
    load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(to.C, C, in.c_row, s, step, length, back, lane);
    if (first_sweep) {
#if RANK > 0
      load_rows<COPY_ROWS, TILE, RANK, RANK_PITCH>(to.low, dt, in.dt_row, s, step, length, back, lane);
#else
      load_tile(to.dt, dt, in.dt_row, s, step);
#endif
      if (writes_dz) load_tile(to.y, y, D_INNER, s, step);
    }
    copies_commit();
  };
  auto widen_tile = [&](const Stage& stage) {
    widen_rows<TILE * D_STATE>(self.B, stage.B, lane);
    widen_rows<TILE * D_STATE>(self.C, stage.C, lane);
  };
  // the 8 quads x WARPS of every step and state of the tile: one sum a thread and turn
  auto block_sum = [&](float* to, int s, int step) {
    block_sync();
    for (int item = threadIdx.x; item < TILE * 16; item += 32 * WARPS) {
      const int i = item / 16, n = item % 16, at = s + step * i;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float* quads = (const float*)block.sums[w][i] + n;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += quads[(j ^ (lane / 16)) * 16];
      }
      if (at >= 0 && at < length && n < D_STATE) {
        const i64 token = (i64)((part * DIRECTIONS + direction) * (i64)in.batch + image) * length +
                          token_of(at, length, back);
        to[token * D_STATE + n] = sum;
      }
    }
    block_sync();
  };

  // sweep 1
  float2* stash = args.stash + ((i64)(direction * in.batch + image) * padded) * D_INNER + channel;
  ACT* dz = NEED_Z ? args.dz + origin * args.dz_row + channel : nullptr;
  const int dz_step = back ? -args.dz_row : args.dz_row;
  if (NEED_Z && back) dz += (i64)(length - 1) * args.dz_row;
  load(self.stage[0], 0, 1, true);
  for (int s = 0, current = 0; s < length; s += TILE, current ^= 1) {
    if (s + TILE < length) {
      load(self.stage[current ^ 1], s + TILE, 1, true);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncwarp();
    const Stage& stage = self.stage[current];
    widen_tile(stage);
#if RANK > 0
    self.projection.run(stage.low, self.dt, lane);
#endif
    __syncwarp();
#pragma unroll(STEPS)
    for (int i = 0; i < TILE; i++) {
      const int k = i * CHANNELS + lane;
      const float x = widen(stage.u[k]);
#if RANK > 0
      float d = self.dt[i * 33 + lane];
#else
      float d = step_size(widen(stage.dt[k]) + bias);
#endif
      float gy = widen(stage.g[k]) * in.scale;
      if constexpr (HAS_Z) {
        const float gate_in = widen(stage.z[k]), gate = sigmoid(gate_in);
        if (writes_dz) {
          if (s + i < length) narrow(gy * widen(stage.y[k]) * silu_slope(gate_in, gate), *dz);
          dz += dz_step;
        }
        gy *= gate_in * gate;
      }
      if (NEED_A && s + i >= length) d = gy = 0.f;
      const float dx = d * x;
      if constexpr (NEED_A) prefix += d;
      const float weight = prefix * gy;
      float product = 0.f, for_C[D_STATE];
#pragma unroll
      for (int n4 = 0; n4 < D_STATE; n4 += 4) {
        const float4 B4 = *(const float4*)(self.B + i * D_STATE + n4);
        const float4 C4 = *(const float4*)(self.C + i * D_STATE + n4);
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
      *stash = make_float2(gy * product, d);
      stash += D_INNER;
    }
    if constexpr (NEED_C) block_sum(args.dC, s, 1);
  }

  // sweep 2: h is now a_{t+1} g_{t+1}
#pragma unroll
  for (int n = 0; n < D_STATE; n++) h[n] = 0.f;
  __syncwarp();
  load(self.stage[0], length - 1, -1, false);
  stash -= (i64)(padded - length + 1) * D_INNER;
  constexpr int AHEAD = 2;
  float2 kept[AHEAD];
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
    kept[a] = length - 1 - a >= 0 ? *stash : make_float2(0.f, 0.f);
    stash -= D_INNER;
  }
  const float skip = HAS_D ? widen(in.D[direction][channel]) : 0.f;
  float carried = 0.f, dD = 0.f, dbias = 0.f;  // carried: U_t / ln 2
  const i64 start = (origin + (back ? 0 : length - 1)) * D_INNER + channel;
  const int step = back ? D_INNER : -D_INNER;
  ACT *du = NEED_U ? args.du[direction] + start : nullptr;
  ACT *ddt = NEED_DT ? args.ddt[direction] + start : nullptr;
  for (int s = length - 1, current = 0; s >= 0; s -= TILE, current ^= 1) {
    if (s - TILE >= 0) {
      load(self.stage[current ^ 1], s - TILE, -1, false);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncwarp();
    const Stage& stage = self.stage[current];
    widen_tile(stage);
    __syncwarp();
#pragma unroll(STEPS)
    for (int i = 0; i < TILE; i++) {
      const bool inside = i <= s;
      const int k = i * CHANNELS + lane;
      const float G = kept[0].x, d = kept[0].y;
#pragma unroll
      for (int a = 0; a + 1 < AHEAD; a++) kept[a] = kept[a + 1];
      kept[AHEAD - 1] = s - i - AHEAD >= 0 ? *stash : make_float2(0.f, 0.f);
      stash -= D_INNER;
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
        const float4 B4 = *(const float4*)(self.B + i * D_STATE + n4);
        const float4 C4 = *(const float4*)(self.C + i * D_STATE + n4);
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
      if (inside) {
        if constexpr (NEED_U) narrow(fmaf(skip, gy, d * dot_B), *du);
        if constexpr (NEED_DT) narrow(grad_dt, *ddt);
        dD = fmaf(gy, x, dD);
        dbias += grad_dt;
      }
      if constexpr (NEED_A) prefix -= d;
      du += step;
      ddt += step;
    }
    if constexpr (NEED_B) block_sum(args.dB, s, -1);
  }

  const i64 at = (i64)(image * DIRECTIONS + direction) * D_INNER + channel;
  if constexpr (NEED_A) {
#pragma unroll
    for (int n = 0; n < D_STATE; n++)
      // A = -exp(A_log) has itself as its derivative; rate holds A * log2(e)
      args.dA[at * D_STATE + n] = dA[n] * (A_IS_LOG ? rate[n] * LN2 : 1.f);
  }
  if constexpr (NEED_D) args.dD[at] = dD;
  if constexpr (NEED_BIAS) args.dbias[at] = dbias;
}
