// The selective scan of one or two directions, forward, with one lane per channel.
//
// A warp owns 32 channels of one direction; a lane keeps the D_STATE states of one channel in
// registers, so the sum over states needs no exchange. With two directions a block is two warps of
// the same channels that walk towards each other: until they meet each leaves its y in `out`, from
// there on each picks up what the other left, adds its own, gates and writes the result. One barrier,
// no second buffer, no atomics.
//
// A batch that fills the GPU is scanned in one launch (PART 0). Long sequences of few images are cut
// into pieces, which fill it: a first launch (PART 1) scans each piece from a zero state and keeps its
// end state and the sum of dt, exp(A * sum dt) being the decay of the whole piece; a second one
// (PART 2) folds the pieces before its own into the state that it starts from, and is else a scan of
// an image as long as the piece.
//
// More macros: PART, SAVE_Y, BLOCKS_PER_SM, UNROLL.
#include "scan.cuh"

struct Args {
  ScanInputs in;
  ACT *out, *y;
#if PART
  float* ends;  // [direction][image][piece][D_STATE end states, sum of dt][channel]
  int piece;    // tokens of a piece; the last one may be shorter
#endif
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

constexpr int STEPS = UNROLL;  // pragmas take no macros

// What a walk makes of its steps: the state alone, y so far, or the finished result.
enum Phase { STATE, ALONE, MEET };

struct alignas(16) Stage {
  ACT u[TILE_ELEMENTS];
#if RANK > 0
  ACT low[TILE * RANK_PITCH];
#else
  ACT raw_dt[TILE_ELEMENTS];
#endif
  // what a step has read here it replaces by its results: y in z, out in partner
  ACT z[HAS_Z || SAVE_Y ? TILE_ELEMENTS : 8], partner[TILE_ELEMENTS];
  ACT B[TILE * D_STATE], C[TILE * D_STATE];
};

struct alignas(16) Warp {
  Stage stage[2];
  float B[TILE * D_STATE], C[TILE * D_STATE];
#if RANK > 0
  StepProjection projection;
#endif
  float dt[TILE * DT_PITCH];
};

// One warp's walk. One copy of the code serves both directions: two would not fit the instruction
// cache.
struct Walk {
  const ScanInputs& in;
  Warp& self;
  const bool back;
  const int lane, length, channels, valid;
  const ACT *u, *dt, *B, *C, *z;
  ACT *out, *y_out;
  RowWalk<COPY_TILE, TILE, CHANNELS, CHANNELS, ACT> walk_u, walk_z, walk_out;
  RowWalk<COPY_ROWS, TILE, D_STATE, D_STATE, ACT> walk_B, walk_C;
#if RANK > 0
  RowWalk<COPY_ROWS, TILE, RANK, RANK_PITCH, ACT> walk_dt;
#else
  RowWalk<COPY_TILE, TILE, CHANNELS, CHANNELS, ACT> walk_dt;
#endif
  float rate[D_STATE], h[D_STATE], skip, bias, elapsed;

  // begin, length: the tokens to scan, counted in the image
  DEVICE Walk(const Args& args, Warp& self, int direction, int image, int begin, int length,
              int first, int lane)
      : in(args.in), self(self), back(is_reversed(direction)), lane(lane), length(length),
        channels(D_INNER ? D_INNER : args.in.channels),
        valid(D_INNER ? CHANNELS : min(CHANNELS, args.in.channels - first)) {
    const i64 origin = (i64)image * in.length + begin;
    u = in.u[direction] + origin * in.u_row + first;
    dt = in.dt[direction] + origin * in.dt_row + (RANK ? 0 : first);
    B = in.B[direction] + origin * in.b_row;
    C = in.C[direction] + origin * in.c_row;
    z = HAS_Z ? in.z + origin * in.z_row + first : nullptr;
    out = args.out + origin * channels + first;
    y_out = SAVE_Y ? args.y + origin * channels + first : nullptr;
    const int channel = first + lane;
    const bool active = lane < valid;
#pragma unroll
    for (int n = 0; n < D_STATE; n++) {
      rate[n] = active ? decay_rate(in.A[direction], (i64)channel * D_STATE + n) : 0.f;
      h[n] = 0.f;
    }
    walk_u.start(u, in.u_row, back, lane);
    walk_dt.start(dt, in.dt_row, back, lane);
    walk_B.start(B, in.b_row, back, lane);
    walk_C.start(C, in.c_row, back, lane);
    if constexpr (HAS_Z) walk_z.start(z, in.z_row, back, lane);
    if constexpr (DIRECTIONS == 2) walk_out.start(out, channels, back, lane);
    skip = HAS_D && active ? widen(in.D[direction][channel]) : 0.f;
    bias = elapsed = 0.f;
#if RANK > 0
    self.projection.load(in.dt_weight[direction], in.dt_bias[direction], first, channels, lane);
    clear_rank_padding(self.stage[0].low, lane);
    clear_rank_padding(self.stage[1].low, lane);
    __syncwarp();
#else
    if (HAS_BIAS && active) bias = widen(in.dt_bias[direction][channel]);
#endif
  }

  template <Phase PHASE> DEVICE void load(Stage& to, int s) {
    walk_u.load(to.u, s, length, lane, valid);
#if RANK > 0
    walk_dt.load(to.low, s, length, lane);
#else
    walk_dt.load(to.raw_dt, s, length, lane, valid);
#endif
    walk_B.load(to.B, s, length, lane);
    if constexpr (PHASE != STATE) walk_C.load(to.C, s, length, lane);
    if constexpr (PHASE == MEET && HAS_Z) walk_z.load(to.z, s, length, lane, valid);
    if constexpr (PHASE == MEET && DIRECTIONS == 2)
      walk_out.load(to.partner, s, length, lane, valid);
    copies_commit();
  }

  // Steps begin .. end - 1.
  template <Phase PHASE> DEVICE void run(int begin, int end) {
    if (begin < end) load<PHASE>(self.stage[0], begin);
    for (int s = begin, current = 0; s < end; s += TILE, current ^= 1) {
      if (s + TILE < end) {
        load<PHASE>(self.stage[current ^ 1], s + TILE);
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncwarp();
      Stage& stage = self.stage[current];
      const float *tile_B = self.B, *tile_C = self.C;
      if constexpr (EXACT) {
        tile_B = (const float*)stage.B, tile_C = (const float*)stage.C;
      } else {
        widen_rows<TILE * D_STATE>(self.B, stage.B, lane);
        if constexpr (PHASE != STATE) widen_rows<TILE * D_STATE>(self.C, stage.C, lane);
      }
#if RANK > 0
      self.projection.run(stage.low, self.dt, lane);
      __syncwarp();
#else
#pragma unroll
      for (int i = 0; i < TILE; i++)
        self.dt[i * DT_PITCH + lane] = step_size(widen(stage.raw_dt[i * CHANNELS + lane]) + bias);
      __syncwarp();
#endif
      const int inside = end - s;  // a step of size 0 leaves the state as it is
      for (int i = inside; i < TILE; i++) self.dt[i * DT_PITCH + lane] = 0.f;
#pragma unroll(STEPS)
      for (int i = 0; i < TILE; i++) {
        const int k = i * CHANNELS + lane;
        const float x = widen(stage.u[k]), d = self.dt[i * DT_PITCH + lane], dx = d * x;
        if constexpr (PHASE == STATE) {
          elapsed += d;
#pragma unroll
          for (int n = 0; n < D_STATE; n++)
            h[n] = fmaf(ex2(d * rate[n]), h[n], dx * tile_B[i * D_STATE + n]);
          continue;
        }
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
        if constexpr (PHASE == MEET) {
          if constexpr (DIRECTIONS == 2) y += widen(stage.partner[k]);
          float gate = in.scale;
          if constexpr (HAS_Z) {
            const float gate_in = widen(stage.z[k]);
            gate *= gate_in * sigmoid(gate_in);
          }
          if constexpr (SAVE_Y) narrow(y, stage.z[k]);
          y *= gate;
        }
        narrow(y, stage.partner[k]);
      }
      __syncwarp();
      if constexpr (PHASE == STATE) continue;
      store_rows<COPY_TILE, TILE, CHANNELS>(out, stage.partner, channels, s, 1, end, length, back,
                                            lane, valid);
      if constexpr (PHASE == MEET && SAVE_Y)
        store_rows<COPY_TILE, TILE, CHANNELS>(y_out, stage.z, channels, s, 1, end, length, back,
                                              lane, valid);
      __syncwarp();
    }
  }

  // The first half up to where the other direction starts, then the half that it has been through. A
  // lone direction has nobody to meet.
  DEVICE void run() {
    if constexpr (DIRECTIONS == 1) {
      run<MEET>(0, length);
    } else {
      const int middle = back ? length - length / 2 : length / 2;
      run<ALONE>(0, middle);
      __syncthreads();
      run<MEET>(middle, length);
    }
  }

#if PART
  // Where this lane's channel has its numbers of a piece: state n at n * channels, then sum dt.
  DEVICE static float* ends_of(const Args& args, int direction, int image, int piece, int pieces,
                               int channels, int channel) {
    const i64 row = ((i64)direction * args.in.batch + image) * pieces + piece;
    return args.ends + row * (D_STATE + 1) * channels + channel;
  }
  DEVICE void leave(float* ends) {
    run<STATE>(0, length);
    if (lane >= valid) return;
#pragma unroll
    for (int n = 0; n < D_STATE; n++) ends[(i64)n * channels] = h[n];
    ends[(i64)D_STATE * channels] = elapsed;
  }
  // One piece further: exp(A sum dt) h + its end state.
  DEVICE void fold(const float* ends) {
    if (lane >= valid) return;
    const float passed = ends[(i64)D_STATE * channels];
#pragma unroll
    for (int n = 0; n < D_STATE; n++)
      h[n] = fmaf(ex2(passed * rate[n]), h[n], ends[(i64)n * channels]);
  }
#endif
};

extern "C" __global__ void __launch_bounds__(32 * DIRECTIONS, BLOCKS_PER_SM)
    scan_forward(const __grid_constant__ Args args) {
  __shared__ Warp warps[DIRECTIONS];
  const int direction = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channels = D_INNER ? D_INNER : args.in.channels;
  const int groups = (channels + CHANNELS - 1) / CHANNELS;
  const int first = blockIdx.x % groups * CHANNELS;
#if PART
  const int pieces = (args.in.length + args.piece - 1) / args.piece;
  const int image = blockIdx.x / groups / pieces, piece = blockIdx.x / groups % pieces;
  const int begin = piece * args.piece, size = min(args.piece, args.in.length - begin);
  const bool back = is_reversed(direction);
  const auto ends = [&](int p) {
    return Walk::ends_of(args, direction, image, p, pieces, channels, first + lane);
  };
  if (PART == 1 && piece == (back ? 0 : pieces - 1)) return;  // nothing comes after it
  Walk walk(args, warps[direction], direction, image, begin, size, first, lane);
  if constexpr (PART == 1) {
    walk.leave(ends(piece));
  } else {
    const int step = back ? -1 : 1;
    for (int p = back ? pieces - 1 : 0; p != piece; p += step) walk.fold(ends(p));
    walk.run();
  }
#else
  const int image = blockIdx.x / groups;
  Walk(args, warps[direction], direction, image, 0, args.in.length, first, lane).run();
#endif
}
