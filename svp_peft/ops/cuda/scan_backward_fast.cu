// The gradients of the selective scan in two sweeps without any stored state: 16-bit tensors.
//
// With the adjoint g_t = dLoss/dh_t, what d dt needs from the states is u_t = a_t g_t h_{t-1}, and that
// telescopes: u_t = u_{t+1} + dy_t C_t h_t - g_t dt_t x_t B_t. Summed over states with the weights A,
//
//   U_t = sum_n A_n u_tn = sum_{s >= t} (G_s - R_s)     G_s = dy_s sum_n A_n C_sn h_sn
//                                                       R_s = dt_s x_s sum_n A_n B_sn g_sn
//
// so state and adjoint need never meet. Sweep 1 (scan order) computes h, dC, dz and leaves G_t, dt_t
// and dy_t in `stash`; sweep 2 (reverse) computes g, dB, dx and d dt. Both take the same a_t to the
// bit: otherwise the sums would not cancel where they must.
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
// What needs no scan (the gate, dz) is done tile by tile with eight channels of a step per lane, which
// reads and writes 16 bytes at once; the steps have one channel per lane.
//
// A block is WARPS x 32 channels of one direction of one image. Sums over channels (dB, dC) go through
// the tensor cores and shared memory to one partial sum per block; reduce.cu adds those up.
//
// More macros: WARPS, BLOCKS_PER_SM, UNROLL, NEED_U, NEED_DT, NEED_B, NEED_C, NEED_Z, NEED_A, NEED_D,
// NEED_BIAS. D_INNER is a multiple of 32 * WARPS, D_STATE 8 or 16, COPY_TILE 16.
#include "scan.cuh"

struct alignas(16) Stash {  // what sweep 1 tells sweep 2 about a tile of a warp
  float2 sums[TILE_ELEMENTS];  // G, dt
  float gy[TILE_ELEMENTS];     // dy
};
struct Args {
  ScanInputs in;
  const ACT *grad_out, *y;
  ACT *du[2], *ddt[2], *dz;
  float *dB, *dC;          // [part][direction][image][token][state]
  Stash* stash;            // [direction][image][32 channels][tile]
  float* states;           // [direction][image][tile][D_STATE + 1][channel]: h before the tile, T;
                           // for dA and dt_bias
  float *dA, *dD, *dbias;  // [image][direction][channel]([state])
  int dz_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");
static_assert(COPY_TILE == 16, "a lane moves eight channels at once");

constexpr int STEPS = UNROLL;  // pragmas take no macros
constexpr bool KEEP_STATES = NEED_A || NEED_BIAS;
// Rows of B and then of C, shared by the warps; each fetches and widens an equal part of them.
constexpr int SHARES = WARPS == 1 ? 2 : 1;  // per warp
constexpr int SHARE = WARPS == 4 ? TILE / 2 : TILE;  // rows

struct alignas(16) First {  // a warp's memory in sweep 1
  struct alignas(16) Stage {
    ACT u[TILE_ELEMENTS], g[TILE_ELEMENTS];
    ACT z[HAS_Z ? TILE_ELEMENTS : 8], y[NEED_Z ? TILE_ELEMENTS : 8];
#if RANK > 0
    ACT low[TILE * RANK_PITCH];
#else
    ACT raw_dt[TILE_ELEMENTS];
#endif
  } stage[2];
#if RANK > 0
  StepProjection projection;
#endif
  float dt[TILE * DT_PITCH], gy[TILE * DT_PITCH];
};
struct alignas(16) Second {  // and in sweep 2
  struct alignas(16) Stage {
    ACT u[TILE_ELEMENTS];
    Stash stash;
  } stage[2];
  u32 results[TILE * DT_PITCH];  // du and d dt side by side
};
// With 4 warps, 16 states and a rank of up to 32 exactly a quarter of what a multiprocessor of an
// H100 has.
struct alignas(16) Block {
  union {
    First first[WARPS];
    Second second[WARPS];
  };
  ACT staged[2 * TILE * D_STATE];  // rows of B and C as they arrive
  float B[TILE * D_STATE], C[TILE * D_STATE];
  QuadSums sums[WARPS];
};

static_assert(sizeof(Block) <= SHARED_BYTES, "the launcher asks for too little shared memory");

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
  First& self = block.first[warp];
  const int length = in.length, padded = (length + TILE - 1) / TILE * TILE;
  const int first = (part * WARPS + warp) * CHANNELS, channel = first + lane;
  const int lane_row = lane / 4, lane_column = lane % 4 * 8;  // of its eight elements of a tile

  const i64 origin = (i64)image * length;  // the image's first token
  const ACT* u = in.u[direction] + origin * in.u_row + first;
  const ACT* dt = in.dt[direction] + origin * in.dt_row + (RANK ? 0 : first);
  const ACT* B = in.B[direction] + origin * in.b_row;
  const ACT* C = in.C[direction] + origin * in.c_row;
  const ACT* z = HAS_Z ? in.z + origin * in.z_row + first : nullptr;
  const ACT* grad_out = args.grad_out + origin * D_INNER + first;
  const ACT* y = NEED_Z ? args.y + origin * D_INNER + first : nullptr;
  const i64 row = ((i64)part * DIRECTIONS + direction) * in.batch + image;
  const int sum_row = warp * 2 + lane / 16;  // what add_up makes of the lane
  RowPlace<float> to_dB, to_dC;
  if constexpr (NEED_B)
    to_dB.start(args.dB + row * length * D_STATE, D_STATE, back, sum_row, lane / 4 % 4 * 4);
  if constexpr (NEED_C)
    to_dC.start(args.dC + row * length * D_STATE, D_STATE, back, sum_row, lane / 4 % 4 * 4);

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
  RowWalk<COPY_ROWS, SHARE, D_STATE, D_STATE, ACT> walk_BC[SHARES];
#if RANK > 0
  RowWalk<COPY_ROWS, TILE, RANK, RANK_PITCH, ACT> walk_dt;
#else
  RowWalk<COPY_TILE, TILE, CHANNELS, CHANNELS, ACT> walk_dt;
#endif
  walk_u.start(u, in.u_row, back, lane);
  walk_g.start(grad_out, D_INNER, back, lane);
  if constexpr (HAS_Z) walk_z.start(z, in.z_row, back, lane);
  if constexpr (NEED_Z) walk_y.start(y, D_INNER, back, lane);
  walk_dt.start(dt, in.dt_row, back, lane);
  const int share = warp * SHARES * SHARE;  // the warp's first row of B and C
#pragma unroll
  for (int j = 0; j < SHARES; j++) {
    const bool is_B = share + j * SHARE < TILE;
    walk_BC[j].start(is_B ? B : C, is_B ? in.b_row : in.c_row, back, lane,
                     (share + j * SHARE) % TILE);
  }
  const i64 walk = (i64)direction * in.batch + image;
  constexpr int SLOT = (D_STATE + 1) * D_INNER;
  Stash* stash = args.stash + (walk * (D_INNER / CHANNELS) + first / CHANNELS) * (padded / TILE);

  auto load_shared = [&](ACT* u, int s) {
    walk_u.load(u, s, length, lane);
#pragma unroll
    for (int j = 0; j < SHARES; j++)
      walk_BC[j].load(block.staged + (share + j * SHARE) * D_STATE, s, length, lane);
  };
  auto load_first = [&](int slot, int s) {
    First::Stage& to = self.stage[slot];
    load_shared(to.u, s);
    walk_g.load(to.g, s, length, lane);
    if constexpr (HAS_Z) walk_z.load(to.z, s, length, lane);
#if RANK > 0
    walk_dt.load(to.low, s, length, lane);
#else
    walk_dt.load(to.raw_dt, s, length, lane);
#endif
    if (writes_dz) walk_y.load(to.y, s, length, lane);
    copies_commit();
  };
  // Every warp has memory of its own in either sweep, but the warps' do not coincide.
  Second& second = block.second[warp];
  auto load_second = [&](int slot, int s, const Stash* from) {
    Second::Stage& to = second.stage[slot];
    load_shared(to.u, s);
#pragma unroll
    for (int i = 0; i < (int)sizeof(Stash) / 16; i += 32)
      copy_async<16>((uint4*)&to.stash + i + lane, (const uint4*)from + i + lane);
    copies_commit();
  };
  auto finish_load = [&] {
    copies_wait<0>();
    __syncwarp();
    const int begin = share * D_STATE;
    widen_rows<SHARES * SHARE * D_STATE>(block.B + begin, block.staged + begin, lane);
  };
  const int step_stride = back ? -D_STATE : D_STATE;
  float4* my_sums = &block.sums[warp][0][place_of(lane / 4, lane % 4)];

  // sweep 1
  Stash* keep = stash;
  float* left = KEEP_STATES ? args.states + walk * (padded / TILE) * SLOT + channel : nullptr;
  RowPlace<ACT> to_dz;
  if constexpr (NEED_Z)
    to_dz.start(args.dz + origin * args.dz_row + first, args.dz_row, back, lane_row, lane_column);
  float prefix = 0.f;  // S_s
  load_first(0, 0);
  finish_load();
  __syncthreads();
  for (int s = 0, slot = 0; s < padded; s += TILE, slot ^= 1) {
    const First::Stage& stage = self.stage[slot];
    const int inside = length - s;  // steps of this tile that exist
    if (s + TILE < padded) load_first(slot ^ 1, s + TILE);
    {
      float gy[8], z[8], gate[8];
      widen_eight(gy, stage.g + lane * 8);
      if constexpr (HAS_Z) widen_eight(z, stage.z + lane * 8);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        gy[j] *= in.scale;
        if constexpr (HAS_Z) gate[j] = sigmoid(z[j]);
      }
      if (writes_dz && lane_row < inside) {
        float dz[8];
        Pack<u32, 4> packed;
        widen_eight(dz, stage.y + lane * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) dz[j] *= gy[j] * silu_slope(z[j], gate[j]);
#pragma unroll
        for (int j = 0; j < 4; j++) packed.v[j] = narrow_pair(ACT{}, dz[2 * j], dz[2 * j + 1]);
        *(Pack<u32, 4>*)to_dz.at(s, length) = packed;
      }
#pragma unroll
      for (int j = 0; j < 8; j++)
        if constexpr (HAS_Z) gy[j] *= z[j] * gate[j];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 four = make_float4(gy[j], gy[j + 1], gy[j + 2], gy[j + 3]);
        *(float4*)(self.gy + lane_row * DT_PITCH + lane_column + j) = four;
        *(float4*)(keep->gy + lane * 8 + j) = four;
      }
    }
#if RANK > 0
    self.projection.run(stage.low, self.dt, lane);
#else
#pragma unroll
    for (int i = 0; i < TILE; i++)
      self.dt[i * DT_PITCH + lane] = step_size(widen(stage.raw_dt[i * CHANNELS + lane]) + bias);
#endif
    if constexpr (KEEP_STATES) {
      prefix = 0.f;
#pragma unroll
      for (int n = 0; n < D_STATE; n++) left[n * D_INNER] = h[n];
    }
    __syncwarp();
    // a step of size 0 leaves everything as it is
    for (int i = inside; i < TILE; i++) self.dt[i * DT_PITCH + lane] = 0.f;
    const ACT* at_u = stage.u + lane;
    const float *at_dt = self.dt + lane, *rows = block.B;
    float4* at_sums = my_sums;
    float2* at_keep = keep->sums + lane;
#pragma unroll(STEPS)
    for (int i = 0; i < TILE; i++) {
      const float x = widen(*at_u), d = *at_dt, gy = at_dt[TILE * DT_PITCH], dx = d * x;
      if constexpr (NEED_A) prefix += d;
      const float weight = prefix * gy;
      float product = 0.f, for_C[D_STATE];
#pragma unroll
      for (int n4 = 0; n4 < D_STATE; n4 += 4) {
        const float4 B4 = *(const float4*)(rows + n4);
        const float4 C4 = *(const float4*)(rows + TILE * D_STATE + n4);
        const float b[4] = {B4.x, B4.y, B4.z, B4.w}, c[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int n = n4 + j;
          h[n] = fmaf(ex2(d * rate[n]), h[n], dx * b[j]);
          const float read = c[j] * h[n];
          product = fmaf(rate[n], read, product);
          for_C[middle_swapped(n)] = gy * h[n];
          if constexpr (NEED_A) dA[n] = fmaf(weight, read, dA[n]);
        }
      }
      if constexpr (NEED_C) *at_sums = quad_sum<false, D_STATE>(for_C, one);
      *at_keep = make_float2(gy * product, d);
      at_u += CHANNELS, at_dt += DT_PITCH, rows += D_STATE, at_sums += 32, at_keep += CHANNELS;
    }
    if constexpr (KEEP_STATES) {
      left[D_STATE * D_INNER] = prefix;
      left += SLOT;
    }
    keep++;
    __syncthreads();
    if constexpr (NEED_C)
      add_up<WARPS>(block.sums, to_dC.at(s, length), step_stride, inside, one, warp, lane);
    if (s + TILE < padded) finish_load();
    __syncthreads();
  }

  // sweep 2: h is now a_{t+1} g_{t+1}
#pragma unroll
  for (int n = 0; n < D_STATE; n++) h[n] = 0.f;
  const float skip = HAS_D ? widen(in.D[direction][channel]) : 0.f;
  float carried = 0.f, dD = 0.f, dbias = 0.f;  // carried: U_t / ln 2
  RowPlace<ACT> to_du, to_ddt;
  const i64 at = origin * D_INNER + first;
  if constexpr (NEED_U)
    to_du.start(args.du[direction] + at, D_INNER, back, lane_row, lane_column);
  if constexpr (NEED_DT)
    to_ddt.start(args.ddt[direction] + at, D_INNER, back, lane_row, lane_column);
  load_second(0, padded - TILE, --keep);
  finish_load();
  __syncthreads();
  for (int s = padded - TILE, slot = 0; s >= 0; s -= TILE, slot ^= 1) {
    const Second::Stage& stage = second.stage[slot];
    const int inside = length - s;
    if (s > 0) load_second(slot ^ 1, s - TILE, --keep);
    if constexpr (KEEP_STATES) {
      left -= SLOT;
      prefix = left[D_STATE * D_INNER];
      if (s + TILE < padded) {
        carried = 0.f;
#pragma unroll
        for (int n = 0; n < D_STATE; n++) {
          const float u_next = h[n] * left[SLOT + n * D_INNER];
          carried = fmaf(rate[n], u_next, carried);
          dA[n] = fmaf(prefix, u_next, dA[n]);
        }
      }
    }
    constexpr int LAST = TILE - 1;
    const ACT* at_u = stage.u + LAST * CHANNELS + lane;
    const float2* at_keep = stage.stash.sums + LAST * CHANNELS + lane;
    const float *at_gy = stage.stash.gy + LAST * CHANNELS + lane, *rows = block.B + LAST * D_STATE;
    float4* at_sums = my_sums + LAST * 32;
    u32* at_results = second.results + LAST * DT_PITCH + lane;
#pragma unroll(STEPS)
    for (int i = LAST; i >= 0; i--) {
      const float G = at_keep->x, d = at_keep->y, gy = *at_gy, x = widen(*at_u), dx = d * x;
      const float weight = -prefix * dx;
      float dots[2], product = 0.f, for_B[D_STATE];  // two sums: half as long a chain
#pragma unroll
      for (int n4 = 0; n4 < D_STATE; n4 += 4) {
        const float4 B4 = *(const float4*)(rows + n4);
        const float4 C4 = *(const float4*)(rows + TILE * D_STATE + n4);
        const float b[4] = {B4.x, B4.y, B4.z, B4.w}, c[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int n = n4 + j;
          const float g = fmaf(gy, c[j], h[n]), read = b[j] * g;
          dots[j % 2] = n < 2 ? read : dots[j % 2] + read;
          product = fmaf(rate[n], read, product);
          for_B[middle_swapped(n)] = dx * g;
          h[n] = g * ex2(d * rate[n]);
          if constexpr (NEED_A) dA[n] = fmaf(weight, read, dA[n]);
        }
      }
      if constexpr (NEED_B) *at_sums = quad_sum<false, D_STATE>(for_B, one);
      const float dot_B = dots[0] + dots[1];
      carried += G - dx * product;
      float grad_dt = fmaf(LN2, carried, x * dot_B);
      if constexpr (SOFTPLUS) grad_dt *= softplus_slope<false>(d);
      if constexpr (NEED_U || NEED_DT)
        *at_results = narrow_pair(ACT{}, fmaf(skip, gy, d * dot_B), grad_dt);
      if constexpr (NEED_D) dD = fmaf(gy, x, dD);
      if constexpr (NEED_BIAS) dbias += i < inside ? grad_dt : 0.f;
      if constexpr (NEED_A) prefix -= d;
      at_u -= CHANNELS, at_keep -= CHANNELS, at_gy -= CHANNELS, rows -= D_STATE;
      at_sums -= 32, at_results -= DT_PITCH;
    }
    __syncthreads();
    if ((NEED_U || NEED_DT) && lane_row < inside) {
      const Pack<u32, 8> pairs =
          *(const Pack<u32, 8>*)(second.results + lane_row * DT_PITCH + lane_column);
      Pack<u32, 4> du, ddt;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 even = pairs.v[2 * j], odd = pairs.v[2 * j + 1];
        du.v[j] = __byte_perm(even, odd, 0x5410), ddt.v[j] = __byte_perm(even, odd, 0x7632);
      }
      if constexpr (NEED_U) *(Pack<u32, 4>*)to_du.at(s, length) = du;
      if constexpr (NEED_DT) *(Pack<u32, 4>*)to_ddt.at(s, length) = ddt;
    }
    if constexpr (NEED_B)
      add_up<WARPS>(block.sums, to_dB.at(s, length), step_stride, inside, one, warp, lane);
    if (s > 0) finish_load();
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
