// The gradients of the selective scan, for every size and type: checkpoints and recomputation.
//
// A block owns 32 channels of one direction of one image, a warp a group of up to 16 states of them.
// Sweep 1 runs the recurrence and leaves the state at every tile's start in `checkpoints`. Sweep 2
// takes the tiles from the last to the first, computes the tile's states again into shared memory and
// walks back through them with the adjoint g_t = dLoss/dh_t = dy_t C_t + a_{t+1} g_{t+1}:
//
//   dC_t = sum_d dy_t h_t       dB_t = sum_d dt_t u_t g_t       du_t = D dy_t + dt_t (B_t . g_t)
//   d dt_t = u_t (B_t . g_t) + sum_n A_n a_tn g_tn h_{t-1,n}    dA_n = sum_t dt_t a_tn g_tn h_{t-1,n}
//
// Sums over channels go to `dB`, `dC` as one partial sum per block, which reduce.cu adds up in a fixed
// order; the parameters' gradients leave here per image.
//
// RANK is 0 here: dt comes per channel. More macros: NEED_U, NEED_DT, NEED_B, NEED_C, NEED_Z, NEED_A,
// NEED_D, NEED_BIAS.
#include "scan.cuh"

struct Args {
  ScanInputs in;
  const ACT *grad_out, *y;
  ACT *du[2], *ddt[2], *dz;
  float *dB, *dC;          // [part][direction][image][token][state]
  float* checkpoints;      // [direction][image][tile][state][channel, padded to 32]
  float *dA, *dD, *dbias;  // [image][direction][channel]([state])
  int dz_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int GROUP = D_STATE < 16 ? D_STATE : 16;  // states of a warp
constexpr int WARPS = D_STATE / GROUP;

struct alignas(16) Stage {
  ACT u[TILE_ELEMENTS], dt[TILE_ELEMENTS], z[TILE_ELEMENTS], g[TILE_ELEMENTS], y[TILE_ELEMENTS];
};
struct alignas(16) Rows { ACT B[TILE * GROUP], C[TILE * GROUP]; };
struct alignas(16) Warp {
  Rows rows[2];
  float B[TILE * GROUP], C[TILE * GROUP];
  float states[TILE][GROUP > 8 ? GROUP : 8][32];  // and, once step i is done, its sums over quads
  float dot_B[TILE][32], carried[TILE][32];
};
struct alignas(16) Block {
  Stage stage[2];
  Warp warps[WARPS];
};

static_assert(sizeof(Block) <= SHARED_BYTES, "the launcher asks for too little shared memory");

DEVICE void block_sync() {
  if constexpr (WARPS == 1)
    __syncwarp();
  else
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    scan_backward(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  Block& block = *(Block*)shared;
  const ScanInputs& in = args.in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Warp& self = block.warps[warp];
  const int channels = D_INNER ? D_INNER : in.channels, length = in.length;
  const int groups = (channels + CHANNELS - 1) / CHANNELS, padded = groups * CHANNELS;
  const int part = blockIdx.x % groups, image = blockIdx.x / groups % in.batch;
  const int direction = blockIdx.x / groups / in.batch;
  const int first = part * CHANNELS, valid = min(CHANNELS, channels - first);
  const int channel = first + lane, first_state = warp * GROUP;
  const bool active = lane < valid, back = is_reversed(direction);
  const int tiles = (length + TILE - 1) / TILE;

  const i64 origin = (i64)image * length;  // the image's first token
  const ACT* u = in.u[direction] + origin * in.u_row + first;
  const ACT* dt = in.dt[direction] + origin * in.dt_row + first;
  const ACT* B = in.B[direction] + origin * in.b_row + first_state;
  const ACT* C = in.C[direction] + origin * in.c_row + first_state;
  const ACT* z = HAS_Z ? in.z + origin * in.z_row + first : nullptr;
  const ACT* grad_out = args.grad_out + origin * channels + first;
  const ACT* y = NEED_Z ? args.y + origin * channels + first : nullptr;
  const bool writes_dz = NEED_Z && direction == 0;
  float* checkpoint = args.checkpoints + ((i64)(direction * in.batch + image) * tiles * D_STATE +
                                          first_state) * padded + channel;

  float rate[GROUP], h[GROUP], carry[GROUP], dA[GROUP];
#pragma unroll
  for (int n = 0; n < GROUP; n++) {
    const i64 at = (i64)channel * D_STATE + first_state + n;
    rate[n] = active ? decay_rate(in.A[direction], at) : 0.f;
    h[n] = carry[n] = dA[n] = 0.f;
  }
  const float skip = HAS_D && active ? widen(in.D[direction][channel]) : 0.f;
  const float bias = HAS_BIAS && active ? widen(in.dt_bias[direction][channel]) : 0.f;
  const Selector one(lane);
  float dD = 0.f, dbias = 0.f;

  auto load_tile = [&](ACT* to, const ACT* from, int row, int s) {
    load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to, from, row, s, 1, length, back, lane, valid);
  };
  auto load = [&](int slot, int s, bool second) {
    Stage& to = block.stage[slot];
    if (warp == 0) {
      load_tile(to.u, u, in.u_row, s);
      load_tile(to.dt, dt, in.dt_row, s);
      if (second) {
        load_tile(to.g, grad_out, channels, s);
        if constexpr (HAS_Z) load_tile(to.z, z, in.z_row, s);
        if (writes_dz) load_tile(to.y, y, channels, s);
      }
    }
    Rows& rows = self.rows[slot];
    load_rows<COPY_ROWS, TILE, GROUP, GROUP>(rows.B, B, in.b_row, s, 1, length, back, lane);
    if (second)
      load_rows<COPY_ROWS, TILE, GROUP, GROUP>(rows.C, C, in.c_row, s, 1, length, back, lane);
    copies_commit();
  };
  auto widen_tile = [&](int slot) {
    widen_rows<TILE * GROUP>(self.B, self.rows[slot].B, lane);
    widen_rows<TILE * GROUP>(self.C, self.rows[slot].C, lane);
    __syncwarp();
  };
  auto step_of = [&](const Stage& stage, int s, int i) {
    return s + i < length ? step_size(widen(stage.dt[i * CHANNELS + lane]) + bias) : 0.f;
  };
  auto advance = [&](float d, float dx, int i) {
#pragma unroll
    for (int n = 0; n < GROUP; n++)
      h[n] = fmaf(ex2(d * rate[n]), h[n], dx * self.B[i * GROUP + n]);
  };

  // sweep 1
  load(0, 0, false);
  for (int tile = 0; tile < tiles; tile++) {
    const int slot = tile % 2;
    if (tile + 1 < tiles) {
      load(slot ^ 1, (tile + 1) * TILE, false);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_sync();
    widen_tile(slot);
#pragma unroll
    for (int n = 0; n < GROUP; n++) checkpoint[((i64)tile * D_STATE + n) * padded] = h[n];
#pragma unroll 2
    for (int i = 0; i < TILE; i++) {
      const float d = step_of(block.stage[slot], tile * TILE, i);
      advance(d, d * widen(block.stage[slot].u[i * CHANNELS + lane]), i);
    }
    block_sync();
  }

  // sweep 2
  load((tiles - 1) % 2, (tiles - 1) * TILE, true);
  for (int tile = tiles - 1; tile >= 0; tile--) {
    const int slot = tile % 2, s = tile * TILE;
    if (tile > 0) {
      load(slot ^ 1, s - TILE, true);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    block_sync();
    widen_tile(slot);
    const Stage& stage = block.stage[slot];
    auto grad_y = [&](int i) {
      if (s + i >= length) return 0.f;
      float g = widen(stage.g[i * CHANNELS + lane]) * in.scale;
      if constexpr (HAS_Z) {
        const float gate_in = widen(stage.z[i * CHANNELS + lane]);
        g *= gate_in * sigmoid(gate_in);
      }
      return g;
    };
#pragma unroll
    for (int n = 0; n < GROUP; n++) h[n] = checkpoint[((i64)tile * D_STATE + n) * padded];
#pragma unroll 1
    for (int i = 0; i < TILE; i++) {
      const float d = step_of(stage, s, i);
#pragma unroll
      for (int n = 0; n < GROUP; n++) self.states[i][n][lane] = h[n];
      advance(d, d * widen(stage.u[i * CHANNELS + lane]), i);
    }
#pragma unroll 1
    for (int i = TILE - 1; i >= 0; i--) {
      const float d = step_of(stage, s, i), gy = grad_y(i);
      const float dx = d * widen(stage.u[i * CHANNELS + lane]);
      float dot_B = 0.f, carried = 0.f, for_B[GROUP], for_C[GROUP];
#pragma unroll
      for (int n = 0; n < GROUP; n++) {
        const float before = self.states[i][n][lane];
        const float g = fmaf(gy, self.C[i * GROUP + n], carry[n]);
        for_C[n] = gy * h[n];
        for_B[n] = dx * g;
        dot_B = fmaf(self.B[i * GROUP + n], g, dot_B);
        carry[n] = ex2(d * rate[n]) * g;
        const float product = carry[n] * before;
        carried = fmaf(rate[n], product, carried);
        if constexpr (NEED_A) dA[n] = fmaf(d, product, dA[n]);
        h[n] = before;
      }
      self.dot_B[i][lane] = dot_B;
      self.carried[i][lane] = carried;
      __syncwarp();
      float4* sums = (float4*)&self.states[i][0][0];
      if constexpr (NEED_B) sums[lane] = quad_sum<EXACT, GROUP>(for_B, one);
      if constexpr (NEED_C) sums[32 + lane] = quad_sum<EXACT, GROUP>(for_C, one);
    }
    block_sync();

    // sums over the warp's channels: a lane adds the eight quads of one state of one step
    if constexpr (NEED_B || NEED_C) {
      for (int i = lane / 16; i < TILE; i += 2) {
        const int n = lane % 16;
        const float* quads = &self.states[i][0][0] + n;
        float sum_B = 0.f, sum_C = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const int group = (j + lane / 16) % 8;  // halves of the warp on different banks
          if constexpr (NEED_B) sum_B += quads[group * 16];
          if constexpr (NEED_C) sum_C += quads[128 + group * 16];
        }
        if (s + i < length && n < GROUP) {
          const i64 token = (i64)((part * DIRECTIONS + direction) * in.batch + image) * length +
                            token_of(s + i, length, back);
          const i64 at = token * D_STATE + first_state + n;
          if constexpr (NEED_B) args.dB[at] = sum_B;
          if constexpr (NEED_C) args.dC[at] = sum_C;
        }
      }
    }
    // what a step gives per channel: the warps share the steps
    for (int i = warp; i < TILE && s + i < length; i += WARPS) {
      const float gy = grad_y(i), d = step_of(stage, s, i);
      const float x = widen(stage.u[i * CHANNELS + lane]);
      float dot_B = 0.f, carried = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        dot_B += block.warps[w].dot_B[i][lane];
        carried += block.warps[w].carried[i][lane];
      }
      float grad_dt = fmaf(x, dot_B, LN2 * carried);
      if constexpr (SOFTPLUS) grad_dt *= softplus_slope<EXACT>(d);
      const i64 token = origin + token_of(s + i, length, back);
      dbias += grad_dt;
      dD = fmaf(gy, x, dD);
      if (active) {
        const i64 at = token * channels + channel;
        if constexpr (NEED_U) narrow(fmaf(skip, gy, d * dot_B), args.du[direction][at]);
        if constexpr (NEED_DT) narrow(grad_dt, args.ddt[direction][at]);
        if (writes_dz) {
          const float gate_in = widen(stage.z[i * CHANNELS + lane]);
          const float g =
              widen(stage.g[i * CHANNELS + lane]) * in.scale * widen(stage.y[i * CHANNELS + lane]);
          narrow(g * silu_slope(gate_in, sigmoid(gate_in)), args.dz[token * args.dz_row + channel]);
        }
      }
    }
    block_sync();
  }

  const i64 at = (i64)(image * DIRECTIONS + direction) * channels + channel;
  if constexpr (NEED_A) {
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
      // A = -exp(A_log) has itself as its derivative; rate holds A * log2(e)
      const float slope = A_IS_LOG ? rate[n] * LN2 : 1.f;
      if (active) args.dA[at * D_STATE + first_state + n] = dA[n] * slope;
    }
  }
  if constexpr (NEED_D || NEED_BIAS) {
    self.dot_B[0][lane] = dD;
    self.carried[0][lane] = dbias;
    block_sync();
    if (warp == 0 && active) {
      for (int w = 1; w < WARPS; w++) {
        dD += block.warps[w].dot_B[0][lane];
        dbias += block.warps[w].carried[0][lane];
      }
      if constexpr (NEED_D) args.dD[at] = dD;
      if constexpr (NEED_BIAS) args.dbias[at] = dbias;
    }
  }
}
