// The selective scan of one or two directions, forward, for batches that fill the GPU.
//
// A warp owns 32 channels of one direction; a lane keeps the D_STATE states of one channel in
// registers, so the sum over states needs no exchange. With two directions a block is two warps of
// the same channels that walk towards each other: until they meet each leaves its y in `out`, from
// there on each picks up what the other left, adds its own, gates and writes the result. One barrier,
// no second buffer, no atomics.
//
// More macros: SAVE_Y, BLOCKS_PER_SM.
#include "scan.cuh"

struct Args {
  ScanInputs in;
  ACT *out, *y;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

struct alignas(16) Stage {
  ACT u[TILE_ELEMENTS];
#if RANK > 0
  ACT low[TILE * RANK_PITCH];
#else
  ACT dt[TILE_ELEMENTS];
#endif
  ACT z[HAS_Z ? TILE_ELEMENTS : 8], partner[DIRECTIONS == 2 ? TILE_ELEMENTS : 8];
  ACT B[TILE * D_STATE], C[TILE * D_STATE];
};

struct alignas(16) Warp {
  Stage stage[2];
  float B[TILE * D_STATE], C[TILE * D_STATE];
#if RANK > 0
  StepProjection projection;
  float dt[TILE * 33];
#endif
};

extern "C" __global__ void __launch_bounds__(32 * DIRECTIONS, BLOCKS_PER_SM)
    scan_forward(const __grid_constant__ Args args) {
  __shared__ Warp warps[DIRECTIONS];
  const ScanInputs& in = args.in;
  const int direction = threadIdx.x / 32, lane = threadIdx.x % 32;
  Warp& self = warps[direction];
  const int channels = D_INNER ? D_INNER : in.channels, length = in.length;
  const int groups = (channels + CHANNELS - 1) / CHANNELS;
  const int image = blockIdx.x / groups, first = blockIdx.x % groups * CHANNELS;
  const int valid = min(CHANNELS, channels - first), channel = first + lane;
  const bool active = lane < valid, back = is_reversed(direction);

  const ACT* u = in.u[direction] + (i64)image * length * in.u_row + first;
  const ACT* B = in.B[direction] + (i64)image * length * in.b_row;
  const ACT* C = in.C[direction] + (i64)image * length * in.c_row;
  const ACT* dt = in.dt[direction] + (i64)image * length * in.dt_row + (RANK ? 0 : first);
  const ACT* z = HAS_Z ? in.z + (i64)image * length * in.z_row + first : nullptr;
  ACT* out = args.out + (i64)image * length * channels + first;
  ACT* y_out = SAVE_Y ? args.y + (i64)image * length * channels + first : nullptr;

  float rate[D_STATE], h[D_STATE];
#pragma unroll
  for (int n = 0; n < D_STATE; n++) {
    rate[n] = active ? decay_rate(in.A[direction], (i64)channel * D_STATE + n) : 0.f;
    h[n] = 0.f;
  }
  const float skip = HAS_D && active ? widen(in.D[direction][channel]) : 0.f;
#if RANK > 0
  self.projection.load(in.dt_weight[direction], in.dt_bias[direction], first, channels, lane);
  clear_rank_padding(self.stage[0].low, lane);
  clear_rank_padding(self.stage[1].low, lane);
  __syncwarp();
#else
  const float bias = HAS_BIAS && active ? widen(in.dt_bias[direction][channel]) : 0.f;
#endif

  auto load = [&](Stage& to, int s, bool meet) {
    load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to.u, u, in.u_row, s, 1, length, back, lane, valid);
#if RANK > 0
    load_rows<COPY_ROWS, TILE, RANK, RANK_PITCH>(to.low, dt, in.dt_row, s, 1, length, back, lane);
#else
    load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to.dt, dt, in.dt_row, s, 1, length, back, lane, valid);
#endif
    load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(to.B, B, in.b_row, s, 1, length, back, lane);
    load_rows<COPY_ROWS, TILE, D_STATE, D_STATE>(to.C, C, in.c_row, s, 1, length, back, lane);
    if (meet) {
      if constexpr (HAS_Z)
        load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to.z, z, in.z_row, s, 1, length, back, lane, valid);
      if constexpr (DIRECTIONS == 2)
        load_rows<COPY_TILE, TILE, CHANNELS, CHANNELS>(to.partner, out, channels, s, 1, length, back, lane, valid);
    }
    copies_commit();
  };

  // a lone direction has nobody to meet: all of it is the second phase
  const int middle = DIRECTIONS == 1 ? 0 : back ? length - length / 2 : length / 2;
  for (int phase = DIRECTIONS == 1; phase < 2; phase++) {
    const int begin = phase ? middle : 0, end = phase ? length : middle;
    if (DIRECTIONS == 2 && phase) __syncthreads();
    if (begin < end) load(self.stage[0], begin, phase);
    for (int s = begin, current = 0; s < end; s += TILE, current ^= 1) {
      if (s + TILE < end) {
        load(self.stage[current ^ 1], s + TILE, phase);
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncwarp();
      const Stage& stage = self.stage[current];
      const float *tile_B, *tile_C;
      if constexpr (EXACT) {
        tile_B = (const float*)stage.B, tile_C = (const float*)stage.C;
      } else {
        widen_rows<TILE * D_STATE>(self.B, stage.B, lane);
        widen_rows<TILE * D_STATE>(self.C, stage.C, lane);
        tile_B = self.B, tile_C = self.C;
      }
#if RANK > 0
      self.projection.run(stage.low, self.dt, lane);
#endif
      __syncwarp();
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        const bool inside = s + i < end;
        const int k = i * CHANNELS + lane;
        const float x = widen(stage.u[k]);
#if RANK > 0
        float d = self.dt[i * 33 + lane];
#else
        float d = step_size(widen(stage.dt[k]) + bias);
#endif
        d = inside ? d : 0.f;  // a step of size 0 leaves the state as it is
        const float dx = d * x;
        float sum[2] = {skip * x, 0.f};
#pragma unroll
        for (int n4 = 0; n4 < D_STATE; n4 += 4) {
          const float4 B4 = *(const float4*)(tile_B + i * D_STATE + n4);
          const float4 C4 = *(const float4*)(tile_C + i * D_STATE + n4);
          const float b[4] = {B4.x, B4.y, B4.z, B4.w}, c[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int n = n4 + j;
            h[n] = fmaf(ex2(d * rate[n]), h[n], dx * b[j]);
            sum[j % 2] = fmaf(h[n], c[j], sum[j % 2]);
          }
        }
        float y = sum[0] + sum[1];
        const i64 at = (i64)token_of(s + i, length, back) * channels + lane;
        if (phase) {
          if constexpr (DIRECTIONS == 2) y += widen(stage.partner[k]);
          float gate = in.scale;
          if constexpr (HAS_Z) {
            const float gate_in = widen(stage.z[k]);
            gate *= gate_in * sigmoid(gate_in);
          }
          if (inside && active) {
            if constexpr (SAVE_Y) narrow(y, y_out[at]);
            narrow(y * gate, out[at]);
          }
        } else if (inside && active) {
          narrow(y, out[at]);
        }
      }
      __syncwarp();
    }
  }
}
