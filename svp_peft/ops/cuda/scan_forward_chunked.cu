// The selective scan, forward, for batches too small to fill the GPU with one lane per channel.
//
// A block owns 8 channels of one image, all directions, and cuts the sequence into CHUNKS pieces that
// are scanned at once: a warp per piece and direction, four lanes per channel. Everything of the 8
// channels is staged in shared memory, dt_proj and softplus done once. Each warp scans its piece from
// a zero state and keeps the end state and the sum of dt; exp(A * sum dt) is the decay of a whole
// piece, so folding the pieces before costs one exponential per state and piece; a second scan then
// gives y. All pieces of both directions end in one gated write.
//
// More macros: SAVE_Y, CHUNKS, BLOCKS_PER_SM.
#include "scan.cuh"

struct Args {
  ScanInputs in;
  ACT *out, *y;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int OWN = 8;                        // channels of a block
constexpr int LANE_STATES = D_STATE / 4;
using States = Pack<float, LANE_STATES>;
constexpr int THREADS = 32 * DIRECTIONS * CHUNKS;

// dt, and dt * u as the recurrence wants them, and where y starts from: D * u.
DEVICE void stage_step(float raw, float x, float skip, int at, float2* steps, float* y) {
  const float d = step_size(raw);
  steps[at] = make_float2(d, d * x);
  y[at] = skip * x;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    scan_forward_chunked(const __grid_constant__ Args args) {
  extern __shared__ float4 shared[];
  const ScanInputs& in = args.in;
  const int length = in.length, channels = D_INNER ? D_INNER : in.channels;
  float* rows = (float*)shared;                                       // [direction][token][B, C]
  float2* steps = (float2*)(rows + DIRECTIONS * length * 2 * D_STATE);  // [direction][token][channel]
  float* y_all = (float*)(steps + DIRECTIONS * length * OWN);           // [direction][token][channel]
  float* ends = y_all + DIRECTIONS * length * OWN;  // [direction][chunk][LANE_STATES + 1][lane]

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int groups = (channels + OWN - 1) / OWN;
  const int image = blockIdx.x / groups, first = blockIdx.x % groups * OWN;
  const int valid = min(OWN, channels - first);

  for (int direction = 0; direction < DIRECTIONS; direction++) {
    const ACT* u = in.u[direction] + (i64)image * length * in.u_row + first;
    const ACT* dt = in.dt[direction] + (i64)image * length * in.dt_row + (RANK ? 0 : first);
    float2* step_out = steps + direction * length * OWN;
    float* y_out = y_all + direction * length * OWN;
#if RANK > 0
    // 16 tokens x 8 channels a warp and turn: low-rank rows (16 x RANK) times dt_weight^T
    const int g = lane / 4, q = lane % 4;
    const W_T* w = in.dt_weight[direction] + (i64)first * RANK;
    u32 weight[RANK_PADDED / 16][2];
    for (int k = 0; k < RANK_PADDED / 16; k++)
      for (int half = 0; half < 2; half++) {
        weight[k][half] = 0;
        for (int j = 0; j < 2; j++) {
          const int r = k * 16 + half * 8 + 2 * q + j;
          if (r < RANK && g < valid)
            weight[k][half] |= (u32)narrowed<ACT>(widen(w[g * RANK + r])).bits << (16 * j);
        }
      }
    float bias[2], skip[2];
    for (int j = 0; j < 2; j++) {
      const int c = 2 * q + j;
      bias[j] = HAS_BIAS && c < valid ? widen(in.dt_bias[direction][first + c]) : 0.f;
      skip[j] = HAS_D && c < valid ? widen(in.D[direction][first + c]) : 0.f;
    }
    for (int t0 = warp * 16; t0 < length; t0 += THREADS / 32 * 16) {
      float c[4] = {bias[0], bias[1], bias[0], bias[1]};
      const int low = min(t0 + g, length - 1), high = min(t0 + g + 8, length - 1);
      const u32* row_low = (const u32*)(dt + (i64)low * in.dt_row) + q;
      const u32* row_high = (const u32*)(dt + (i64)high * in.dt_row) + q;
#pragma unroll
      for (int k = 0; k < RANK_PADDED / 16; k++) {
        const bool left = k * 16 + 2 * q < RANK, right = k * 16 + 2 * q + 8 < RANK;
        mma_16(ACT{}, c, left ? row_low[k * 8] : 0u, left ? row_high[k * 8] : 0u,
               right ? row_low[k * 8 + 4] : 0u, right ? row_high[k * 8 + 4] : 0u, weight[k][0],
               weight[k][1]);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int t = t0 + g + j / 2 * 8, channel = 2 * q + j % 2;
        if (t < length) {
          const float x = channel < valid ? widen(u[(i64)t * in.u_row + channel]) : 0.f;
          stage_step(c[j], x, skip[j % 2], t * OWN + channel, step_out, y_out);
        }
      }
    }
#else
    const int c = thread % OWN;
    const float bias = HAS_BIAS && c < valid ? widen(in.dt_bias[direction][first + c]) : 0.f;
    const float skip = HAS_D && c < valid ? widen(in.D[direction][first + c]) : 0.f;
    for (int t = thread / OWN; t < length; t += THREADS / OWN) {
      const float raw = c < valid ? widen(dt[(i64)t * in.dt_row + c]) + bias : 0.f;
      const float x = c < valid ? widen(u[(i64)t * in.u_row + c]) : 0.f;
      stage_step(raw, x, skip, t * OWN + c, step_out, y_out);
    }
#endif
    const ACT* B = in.B[direction] + (i64)image * length * in.b_row;
    const ACT* C = in.C[direction] + (i64)image * length * in.c_row;
    float* row_out = rows + direction * length * 2 * D_STATE;
    for (int i = thread; i < length * D_STATE; i += THREADS) {
      const int t = i / D_STATE, n = i % D_STATE;
      row_out[t * 2 * D_STATE + n] = widen(B[(i64)t * in.b_row + n]);
      row_out[t * 2 * D_STATE + D_STATE + n] = widen(C[(i64)t * in.c_row + n]);
    }
  }

  const int direction = warp % DIRECTIONS, chunk = warp / DIRECTIONS;
  const bool back = is_reversed(direction);
  const int own = lane / 4, part = lane % 4;
  float rate[LANE_STATES], h[LANE_STATES];
#pragma unroll
  for (int n = 0; n < LANE_STATES; n++) {
    const i64 at = (i64)(first + own) * D_STATE + part * LANE_STATES + n;
    rate[n] = own < valid ? decay_rate(in.A[direction], at) : 0.f;
    h[n] = 0.f;
  }
  __syncthreads();

  const int size = (length + CHUNKS - 1) / CHUNKS;
  const int begin = min(chunk * size, length), end = min(begin + size, length);
  const int stride = back ? -1 : 1;
  const float* my_rows = rows + direction * length * 2 * D_STATE + part * LANE_STATES;
  const float2* my_steps = steps + direction * length * OWN + own;
  float* my_y = y_all + direction * length * OWN + own;
  auto advance = [&](int t) {
    const float2 step = my_steps[t * OWN];
    const States b = *(const States*)(my_rows + t * 2 * D_STATE);
#pragma unroll
    for (int n = 0; n < LANE_STATES; n++)
      h[n] = fmaf(ex2(step.x * rate[n]), h[n], step.y * b.v[n]);
    return step.x;
  };

  if (CHUNKS > 1) {
    float total = 0.f;
    int t = back ? length - 1 - begin : begin;
    if (chunk < CHUNKS - 1) {
#pragma unroll 4
      for (int s = begin; s < end; s++, t += stride) total += advance(t);
    }
    constexpr int SLOT = (LANE_STATES + 1) * 32;
    float* mine = ends + (direction * CHUNKS + chunk) * SLOT + lane;
#pragma unroll
    for (int n = 0; n < LANE_STATES; n++) {
      mine[n * 32] = h[n];
      h[n] = 0.f;
    }
    mine[LANE_STATES * 32] = total;
    __syncthreads();
    for (int j = 0; j < chunk; j++) {
      const float* before = ends + (direction * CHUNKS + j) * SLOT + lane;
      const float decay = before[LANE_STATES * 32];
#pragma unroll
      for (int n = 0; n < LANE_STATES; n++) h[n] = fmaf(ex2(decay * rate[n]), h[n], before[n * 32]);
    }
  }
  int t = back ? length - 1 - begin : begin;
#pragma unroll 4
  for (int s = begin; s < end; s++, t += stride) {
    advance(t);
    const States c = *(const States*)(my_rows + t * 2 * D_STATE + D_STATE);
    float y = 0.f;
#pragma unroll
    for (int n = 0; n < LANE_STATES; n++) y = fmaf(h[n], c.v[n], y);
    y += __shfl_xor_sync(~0u, y, 1);
    y += __shfl_xor_sync(~0u, y, 2);
    if (part == 0) my_y[t * OWN] += y;
  }
  __syncthreads();

  const int c = thread % OWN;
  for (int t = thread / OWN; t < length; t += THREADS / OWN) {
    if (c >= valid) continue;
    float y = y_all[t * OWN + c];
    if (DIRECTIONS == 2) y += y_all[(length + t) * OWN + c];
    const i64 token = (i64)image * length + t;
    float gate = in.scale;
    if constexpr (HAS_Z) {
      const float gate_in = widen(in.z[token * in.z_row + first + c]);
      gate *= gate_in * sigmoid(gate_in);
    }
    if constexpr (SAVE_Y) narrow(y, args.y[token * channels + first + c]);
    narrow(y * gate, args.out[token * channels + first + c]);
  }
}
