/* The passes of revtrain.kernels over states in float32, each one way through memory. What they compute is said by the
 * specifications in plain torch, in the modules of the same names. Value for value they round as those do; sums are taken in
 * another order.
 *
 * B samples, C channels, S pixels. A state, or a part of it, has its samples `stride` values apart; a sample is dense, its
 * channels one behind the other. Where tiles of images are served, too, a sample has R rows of S pixels, and a `view` says how
 * far samples, rows and channels lie apart. Other tensors lie so, too, or channels last (`last`): a row's pixels then lie one
 * behind the other, C values each. Sums are made for parts that do not depend on the number of threads, which so changes
 * none of them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define N 8             /* values of a vector, and pixels or channels of a block that is turned */
#define LINE 16         /* values of a line of the cache */
#define ADDED 2048      /* values that are added in float32 before they are added in float64 */
#define WORTH (1 << 16) /* values: with fewer of them threads cost more than they save */

typedef int64_t whole;
typedef struct {
  float *at;
  whole sample, row, channel; /* how far one lies from the next; `channel` is not looked at where channels come last */
} view;
typedef float vector __attribute__((vector_size(4 * N)));
typedef int32_t mask __attribute__((vector_size(4 * N)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif
#define EACH for (int k = 0; k < N; k++)
#define INLINE inline __attribute__((always_inline))
#define OWN __attribute__((noinline))
#define UNROLLED _Pragma("GCC unroll 8")
#define PARALLEL(work) num_threads(threads) if (threads > 1 && (work) > WORTH)

static whole least(whole a, whole b) { return a < b ? a : b; }

static inline vector load(const float *p, whole n) {
  vector v;
  if (n >= N) {
    memcpy(&v, p, sizeof v);
    return v;
  }
  EACH v[k] = k < n ? p[k] : 0;
  return v;
}

static inline void store(float *p, vector v, whole n) {
  if (n >= N)
    memcpy(p, &v, sizeof v);
  else
    for (whole k = 0; k < n; k++) p[k] = v[k];
}

static inline vector all(float x) { return (vector){x, x, x, x, x, x, x, x}; }
static inline vector choose(mask m, vector a, vector b) { return (vector)((m & (mask)a) | (~m & (mask)b)); }

/* a b + c, rounded once where the processor can: as torch's addcmul and its sum with a factor */
static inline vector fused(vector a, vector b, vector c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  EACH a[k] = fmaf(a[k], b[k], c[k]);
  return a;
#else
  return a * b + c;
#endif
}

static inline float sum_of(vector v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

/* eight vectors as the rows of a matrix become its columns */
static inline void transpose(vector r[N]) {
  vector t[N];
  for (int k = 0; k < N; k += 2) {
    t[k] = PICK(r[k], r[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[k + 1] = PICK(r[k], r[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int k = 0; k < N; k += 4)
    for (int j = 0; j < 2; j++) {
      r[k + j] = PICK(t[k + j], t[k + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[k + j + 2] = PICK(t[k + j], t[k + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; k++) {
    vector low = r[k], high = r[k + 4];
    r[k] = PICK(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    r[k + 4] = PICK(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/* four channels: eight pixels of each become four vectors of two pixels */
static inline void turn_four(vector r[N]) {
  vector low = PICK(r[0], r[1], 0, 8, 1, 9, 2, 10, 3, 11), low2 = PICK(r[2], r[3], 0, 8, 1, 9, 2, 10, 3, 11);
  vector high = PICK(r[0], r[1], 4, 12, 5, 13, 6, 14, 7, 15), high2 = PICK(r[2], r[3], 4, 12, 5, 13, 6, 14, 7, 15);
  r[0] = PICK(low, low2, 0, 1, 8, 9, 2, 3, 10, 11);
  r[1] = PICK(low, low2, 4, 5, 12, 13, 6, 7, 14, 15);
  r[2] = PICK(high, high2, 0, 1, 8, 9, 2, 3, 10, 11);
  r[3] = PICK(high, high2, 4, 5, 12, 13, 6, 7, 14, 15);
}

static inline void turn_four_back(vector r[N]) {
  vector low = PICK(r[0], r[1], 0, 4, 8, 12, 1, 5, 9, 13), low2 = PICK(r[2], r[3], 0, 4, 8, 12, 1, 5, 9, 13);
  vector high = PICK(r[0], r[1], 2, 6, 10, 14, 3, 7, 11, 15), high2 = PICK(r[2], r[3], 2, 6, 10, 14, 3, 7, 11, 15);
  r[0] = PICK(low, low2, 0, 1, 2, 3, 8, 9, 10, 11);
  r[1] = PICK(low, low2, 4, 5, 6, 7, 12, 13, 14, 15);
  r[2] = PICK(high, high2, 0, 1, 2, 3, 8, 9, 10, 11);
  r[3] = PICK(high, high2, 4, 5, 6, 7, 12, 13, 14, 15);
}

static INLINE float *row_of(view x, whole b, whole row) { return x.at + b * x.sample + row * x.row; }

/* a block of a row, channels c to c + rows, pixels s to s + n: a vector of pixels for each channel; the channels lie `apart`,
 * or last */
static INLINE void fetch(vector r[N], const float *sample, int last, whole C, whole apart, whole c, whole rows, whole s, whole n) {
  if (!last) {
    for (whole i = 0; i < rows; i++) r[i] = load(sample + (c + i) * apart + s, n);
  } else if (rows == 4 && C == 4 && n == N) {
    UNROLLED for (whole i = 0; i < 4; i++) r[i] = load(sample + s * 4 + i * N, N);
    turn_four_back(r);
  } else {
    UNROLLED EACH r[k] = k < n ? load(sample + (s + k) * C + c, rows) : all(0);
    transpose(r);
  }
}

static INLINE void put(vector r[N], float *sample, int last, whole C, whole apart, whole c, whole rows, whole s, whole n) {
  if (!last) {
    for (whole i = 0; i < rows; i++) store(sample + (c + i) * apart + s, r[i], n);
  } else if (rows == 4 && C == 4 && n == N) {
    turn_four(r);
    UNROLLED for (whole i = 0; i < 4; i++) store(sample + s * 4 + i * N, r[i], N);
  } else {
    transpose(r);
    UNROLLED for (whole k = 0; k < n; k++) store(sample + (s + k) * C + c, r[k], rows);
  }
}

/* Memory takes its time, and the processor's own guess fails where rows are turned: lines are asked for before their turn. Of
 * a short dense sample as many lines of the next one, in the order of memory; else those of the square four further on. */
#define LONG (64 * LINE) /* pixels */

static INLINE void ask_for(const float *p, whole lines, whole apart) {
  for (whole i = 0; i < lines; i++) __builtin_prefetch(p + i * apart, 1, 3);
}

static INLINE void ask_ahead(const float *sample, whole next, int last, whole C, whole S, whole apart, whole c, whole s) {
  whole channels = least(LINE, C - c), pixels = least(LINE, S - s);
  if (next)
    ask_for(sample + next + s * C + c * LINE, channels, LINE);
  else if (!last)
    ask_for(sample + c * apart + s + 4 * LINE, channels, apart);
  else if (C > LINE)
    ask_for(sample + (s + 4 * LINE) * C + c, pixels, C);
  else
    ask_for(sample + (s + 4 * LINE) * C, C, LINE);
}

/* how far the next sample lies, if lines of it are to be asked for, else zero */
static INLINE whole next_of(view x, int last, whole C, whole R, whole S) {
  return R == 1 && S <= LONG && (last || x.channel == S) ? x.sample : 0;
}

/* DO(rows, n) for each block of a row whose channels come last on the other side, in squares of LINE channels and LINE
 * pixels, so that each line of the cache, on either side, is gone through at once: channels a power of two apart would push
 * each other out. Sizes of most blocks are constants, for which the compiler makes code without loops and branches. */
#define BLOCKS(C, S, x, x_next, x_apart, u, u_next, DO)                     \
  for (whole line = 0; line < (S); line += LINE)                            \
    for (whole lines = 0; lines < (C); lines += LINE) {                     \
      ask_ahead(x, x_next, 0, C, S, x_apart, lines, line);                  \
      ask_ahead(u, u_next, 1, C, S, 0, lines, line);                        \
      for (whole c = lines; c < least(lines + LINE, (C)); c += N)           \
        for (whole s = line; s < least(line + LINE, (S)); s += N) {         \
          whole rows = least(N, (C)-c), n = least(N, (S)-s);                \
          if (rows == N && n == N)                                          \
            DO(N, N);                                                       \
          else if (rows == 4 && n == N)                                     \
            DO(4, N);                                                       \
          else                                                              \
            DO(rows, n);                                                    \
        }                                                                   \
    }

/* DO(1, n) for the channels of a row one by one, where they lie so on both sides */
#define ROWS(C, S, DO)                                           \
  for (whole c = 0; c < (C); c++) {                              \
    whole full = (S) / N * N, s = 0;                             \
    for (; s < full; s += N) DO(1, N);                           \
    if (s < (S)) DO(1, (S)-s);                                   \
  }

static INLINE void read_block(const float *x, whole x_apart, float *u, whole u_apart, int last, whole C, float unit,
                              const float *scale, const float *shift, whole c, whole rows, whole s, whole n) {
  vector r[N] = {0};
  fetch(r, x, 0, C, x_apart, c, rows, s, n);
  UNROLLED for (whole i = 0; i < rows; i++) {
    r[i] = r[i] * unit;
    if (scale) r[i] = fused(r[i], all(scale[c + i]), all(shift[c + i]));
  }
  put(r, u, last, C, u_apart, c, rows, s, n);
}

static OWN void read_row(const float *x, whole x_next, whole x_apart, whole C, whole S, float unit, const float *scale,
                         const float *shift, float *u, whole u_next, whole u_apart, int last) {
#define LAST(rows, n) read_block(x, x_apart, u, u_apart, 1, C, unit, 0, 0, c, rows, s, n)
#define NORMALISED(rows, n) read_block(x, x_apart, u, u_apart, 1, C, unit, scale, shift, c, rows, s, n)
#define AS_IT_LIES(rows, n) read_block(x, x_apart, u, u_apart, 0, C, unit, scale, shift, c, rows, s, n)
  if (last && scale) {
    BLOCKS(C, S, x, x_next, x_apart, u, u_next, NORMALISED)
  } else if (last) {
    BLOCKS(C, S, x, x_next, x_apart, u, u_next, LAST)
  } else if (scale || unit != 1) {
    ROWS(C, S, AS_IT_LIES)
  } else {
    if (x_apart == S && u_apart == S) S *= C, C = 1;
    for (whole c = 0; c < C; c++) memcpy(u + c * u_apart, x + c * x_apart, sizeof(float) * (size_t)S);
  }
}

void revtrain_read(const view *x, const view *u, int last, whole B, whole C, whole R, whole S, float unit, const float *scale,
                   const float *shift, int threads) {
  whole x_next = next_of(*x, 0, C, R, S), u_next = next_of(*u, last, C, R, S);
#pragma omp parallel for collapse(2) PARALLEL(B * C * R * S)
  for (whole b = 0; b < B; b++)
    for (whole r = 0; r < R; r++)
      read_row(row_of(*x, b, r), x_next, x->channel, C, S, unit, scale, shift, row_of(*u, b, r), u_next, u->channel, last);
}

typedef struct {
  float factor, step, before, after, limit;
} sum_rule;

static INLINE void add_block(float *x, whole x_apart, const float *u, whole u_apart, int last, whole C, sum_rule rule, int on_grid,
                             int exact, mask *beyond, whole c, whole rows, whole s, whole n) {
  vector r[N] = {0};
  mask left = {0};
  fetch(r, u, last, C, u_apart, c, rows, s, n);
  UNROLLED for (whole i = 0; i < rows; i++) {
    float *to = x + (c + i) * x_apart + s;
    vector v = load(to, n);
    if (on_grid) {
      vector scaled = r[i] * rule.before * rule.after;
      EACH scaled[k] = rintf(scaled[k]);
      v += scaled * rule.step;
      left -= ~((v < rule.limit) & (v > -rule.limit));
    } else if (exact) {
      v += r[i] * rule.factor;
    } else {
      v = fused(r[i], all(rule.factor), v);
    }
    store(to, v, n);
  }
  for (whole k = n; k < N; k++) left[k] = 0;
  *beyond += left;
}

static OWN whole add_to_row(float *x, whole x_next, whole x_apart, whole C, whole S, const float *u, whole u_next, whole u_apart,
                            int last, sum_rule rule) {
  mask beyond = {0};
  whole all_beyond = 0;
  int exact = rule.factor == 1 || rule.factor == -1;
#define ON_GRID(rows, n) add_block(x, x_apart, u, u_apart, last, C, rule, 1, 0, &beyond, c, rows, s, n)
#define EXACT(rows, n) add_block(x, x_apart, u, u_apart, last, C, rule, 0, 1, &beyond, c, rows, s, n)
#define FUSED(rows, n) add_block(x, x_apart, u, u_apart, last, C, rule, 0, 0, &beyond, c, rows, s, n)
  if (!last && x_apart == S && u_apart == S) S *= C, C = 1; /* one row: no channel has a number of its own here */
  if (rule.step && last) {
    BLOCKS(C, S, x, x_next, x_apart, u, u_next, ON_GRID)
  } else if (rule.step) {
    ROWS(C, S, ON_GRID)
  } else if (exact && last) {
    BLOCKS(C, S, x, x_next, x_apart, u, u_next, EXACT)
  } else if (exact) {
    ROWS(C, S, EXACT)
  } else if (last) {
    BLOCKS(C, S, x, x_next, x_apart, u, u_next, FUSED)
  } else {
    ROWS(C, S, FUSED)
  }
  EACH all_beyond += beyond[k];
  return all_beyond;
}

/* x += factor r without a grid (step = 0); else x += step round(r before after). Returns how many left the range. */
whole revtrain_add(const view *x, const view *u, int last, whole B, whole C, whole R, whole S, float factor, float step,
                   float before, float after, float limit, int threads) {
  sum_rule rule = {factor, step, before, after, limit};
  whole beyond = 0, x_next = next_of(*x, 0, C, R, S), u_next = next_of(*u, last, C, R, S);
#pragma omp parallel for collapse(2) reduction(+ : beyond) PARALLEL(B * C * R * S)
  for (whole b = 0; b < B; b++)
    for (whole r = 0; r < R; r++)
      beyond += add_to_row(row_of(*x, b, r), x_next, x->channel, C, S, row_of(*u, b, r), u_next, u->channel, last, rule);
  return beyond;
}

/* sums (B, C): of x, or with `mean` of (x - mean)^2 */
void revtrain_sums(const float *x, whole stride, whole B, whole C, whole S, const float *mean, double *sums, int threads) {
#pragma omp parallel for PARALLEL(B * C * S)
  for (whole i = 0; i < B * C; i++) {
    const float *row = x + i / C * stride + i % C * S;
    float m = mean ? mean[i % C] : 0;
    double sum = 0;
    for (whole begin = 0; begin < S; begin += ADDED) {
      whole end = least(begin + ADDED, S), full = begin + (end - begin) / (4 * N) * 4 * N, s = begin;
      vector lanes[4] = {0};
      for (; s < full; s += 4 * N)
        for (int j = 0; j < 4; j++) {
          vector v = load(row + s + j * N, N) - m;
          lanes[j] += mean ? v * v : v;
        }
      for (; s < end; s++) {
        float v = row[s] - m;
        sum += mean ? v * v : v;
      }
      sum += sum_of((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    }
    sums[i] = sum;
  }
}

/* a bit for each value, the first one's the lowest */
static inline uint8_t packed(mask m) {
#ifdef __AVX__
  return (uint8_t)__builtin_ia32_movmskps256((vector)m);
#else
  mask bits = m & (mask){1, 2, 4, 8, 16, 32, 64, 128};
  int all_bits = 0;
  EACH all_bits |= bits[k];
  return (uint8_t)all_bits;
#endif
}

/* where z was not above zero, by its signs, a bit each, or else by y */
static inline mask below(const uint8_t *signs, vector y) {
  if (!signs) return ~(y > 0);
  int bits = *signs;
  mask each = {bits, bits, bits, bits, bits, bits, bits, bits};
  return (each & (mask){1, 2, 4, 8, 16, 32, 64, 128}) != 0;
}

/* x becomes y; with `signs`, S is a multiple of eight */
void revtrain_forward(float *x, whole B, whole C, whole S, const float *mean, const float *factor, const float *bias, float slope,
                      uint8_t *signs, int threads) {
#pragma omp parallel for PARALLEL(B * C * S)
  for (whole i = 0; i < B * C; i++) {
    float *row = x + i * S, m = mean[i % C], f = factor[i % C], a = bias[i % C];
    for (whole s = 0; s < S; s += N) {
      vector z = (load(row + s, S - s) - m) * f + a;
      mask low = ~(z > 0);
      if (signs) {
        signs[(i * S + s) / 8] = packed(low);
      }
      store(row + s, choose(low, z * slope, z), S - s);
    }
  }
}

/* sums (2, B, C): of dz and of dz xhat */
void revtrain_activation_sums(const float *y, const float *dy, const uint8_t *signs, whole B, whole C, whole S, const float *gain,
                              const float *bias, float slope, double *sums, int threads) {
  float back = (float)(1.0 / slope);
#pragma omp parallel for PARALLEL(B * C * S)
  for (whole i = 0; i < B * C; i++) {
    float g = gain[i % C], a = bias[i % C];
    double one = 0, other = 0;
    for (whole begin = 0; begin < S; begin += ADDED) {
      whole end = least(begin + ADDED, S);
      vector lanes = {0}, lanes_x = {0};
      for (whole s = begin; s < end; s += N) {
        whole at = i * S + s;
        vector v = load(y + at, end - s), dz = load(dy + at, end - s);
        dz = choose(below(signs ? signs + at / 8 : 0, v), dz * slope, dz);
        lanes += dz;
        lanes_x += (choose(~(v > 0), v * back, v) - a) / g * dz;
      }
      one += sum_of(lanes), other += sum_of(lanes_x);
    }
    sums[i] = one;
    sums[B * C + i] = other;
  }
}

/* (y, dy) become (x, dx); means (2, C) of dz and dz xhat, or none */
void revtrain_undo(float *y, float *dy, const uint8_t *signs, whole B, whole C, whole S, const float *mean, const float *deviation,
                   const float *gain, const float *bias, float slope, const float *means, int threads) {
  float back = (float)(1.0 / slope);
#pragma omp parallel for PARALLEL(B * C * S)
  for (whole i = 0; i < B * C; i++) {
    whole c = i % C;
    float m = mean[c], d = deviation[c], g = gain[c], a = bias[c], scale = g / d;
    float m0 = means ? means[c] : 0, m1 = means ? means[C + c] : 0;
    for (whole s = 0; s < S; s += N) {
      whole at = i * S + s, n = S - s;
      vector v = load(y + at, n), dz = load(dy + at, n);
      dz = choose(below(signs ? signs + at / 8 : 0, v), dz * slope, dz);
      vector xhat = (choose(~(v > 0), v * back, v) - a) / g;
      if (means) dz = fused(-xhat, all(m1), dz) - m0;
      store(dy + at, dz * scale, n);
      store(y + at, xhat * d + m, n);
    }
  }
}

/* dx += scale du for a block; what is to be summed is added to `lanes` and `lanes_x` */
static INLINE void gradient_block(float *dx, whole d_apart, const float *du, whole u_apart, int last, const float *x,
                                  whole x_apart, whole C, const float *mean, const float *scale, vector lanes[N],
                                  vector lanes_x[N], whole c, whole rows, whole s, whole n) {
  vector r[N] = {0};
  fetch(r, du, last, C, u_apart, c, rows, s, n);
  UNROLLED for (whole i = 0; i < rows; i++) {
    float *to = dx + (c + i) * d_apart + s;
    lanes[i] += r[i];
    lanes_x[i] += (load(x + (c + i) * x_apart + s, n) - mean[c + i]) * r[i];
    store(to, fused(r[i], all(scale[c + i]), load(to, n)), n);
  }
}

static OWN void norm_gradient_of_row(float *dx, whole d_apart, const float *du, whole u_apart, int last, const float *x,
                                     whole x_apart, whole C, whole S, const float *mean, const float *scale, double *sums,
                                     double *sums_x) {
  for (whole c = 0; c < C; c += N) {
    whole rows = least(N, C - c);
    for (whole begin = 0; begin < S; begin += ADDED) {
      vector lanes[N] = {0}, lanes_x[N] = {0};
      for (whole s = begin; s < least(begin + ADDED, S); s += N)
        if (rows == N && S - s >= N)
          gradient_block(dx, d_apart, du, u_apart, last, x, x_apart, C, mean, scale, lanes, lanes_x, c, N, s, N);
        else
          gradient_block(dx, d_apart, du, u_apart, last, x, x_apart, C, mean, scale, lanes, lanes_x, c, rows, s, least(N, S - s));
      for (whole i = 0; i < rows; i++) sums[c + i] += sum_of(lanes[i]), sums_x[c + i] += sum_of(lanes_x[i]);
    }
  }
}

/* dx += scale du; to the zeros in sums (2, B, parts, C), each of some rows: of du and of du (x - mean) */
void revtrain_norm_gradient(const view *dx, const view *du, int last, const view *x, whole B, whole C, whole R, whole S,
                            const float *mean, const float *scale, double *sums, whole parts, int threads) {
#pragma omp parallel for PARALLEL(B * C * R * S)
  for (whole i = 0; i < B * parts; i++) {
    whole b = i / parts, part = i % parts;
    for (whole r = R * part / parts; r < R * (part + 1) / parts; r++)
      norm_gradient_of_row(row_of(*dx, b, r), dx->channel, row_of(*du, b, r), du->channel, last, row_of(*x, b, r), x->channel, C,
                           S, mean, scale, sums + i * C, sums + (B * parts + i) * C);
  }
}

/* dx -= slope x + shift */
void revtrain_norm_rest(float *dx, whole d_stride, const float *x, whole stride, whole B, whole C, whole S, const float *slope,
                        const float *shift, int threads) {
#pragma omp parallel for PARALLEL(B * C * S)
  for (whole i = 0; i < B * C; i++) {
    const float *row = x + i / C * stride + i % C * S;
    float *to = dx + i / C * d_stride + i % C * S, k = slope[i % C], t = shift[i % C];
    for (whole s = 0; s < S; s += N) store(to + s, fused(load(row + s, S - s), all(-k), load(to + s, S - s)) - t, S - s);
  }
}

/* a row of pixels is parted: each r-th one comes to one of r rows, `step` values from each other; or back */
static INLINE void part_row(float *apart, whole step, const float *mixed, whole pixels, whole r) {
  whole w = 0;
  if (r == 2)
    for (; w + N <= pixels; w += N) {
      vector low = load(mixed + 2 * w, N), high = load(mixed + 2 * w + N, N);
      store(apart + w, PICK(low, high, 0, 2, 4, 6, 8, 10, 12, 14), N);
      store(apart + step + w, PICK(low, high, 1, 3, 5, 7, 9, 11, 13, 15), N);
    }
  for (; w < pixels; w++)
    for (whole j = 0; j < r; j++) apart[j * step + w] = mixed[w * r + j];
}

static INLINE void mix_row(float *mixed, const float *apart, whole step, whole pixels, whole r) {
  whole w = 0;
  if (r == 2)
    for (; w + N <= pixels; w += N) {
      vector even = load(apart + w, N), odd = load(apart + step + w, N);
      store(mixed + 2 * w, PICK(even, odd, 0, 8, 1, 9, 2, 10, 3, 11), N);
      store(mixed + 2 * w + N, PICK(even, odd, 4, 12, 5, 13, 6, 14, 7, 15), N);
    }
  for (; w < pixels; w++)
    for (whole j = 0; j < r; j++) mixed[w * r + j] = apart[j * step + w];
}

static OWN void pool_unit(float *x, float *copy, whole C, whole H, whole W, whole r, int back) {
  whole pixels = W / r, part = C * (H / r) * pixels; /* values of one of the r^2 parts */
  memcpy(copy, x, sizeof(float) * (size_t)(C * H * W));
  for (whole i = 0; i < r; i++)
    for (whole row = 0; row < C * (H / r); row++) { /* of the parts (i, 0) to (i, r - 1) */
      whole apart = i * r * part + row * pixels, mixed = (row * r + i) * W;
      if (back)
        mix_row(x + mixed, copy + apart, part, pixels, r);
      else
        part_row(x + apart, part, copy + mixed, pixels, r);
    }
}

/* each unit (C, H, W) becomes (r, r, C, H / r, W / r) in its own memory, or `back`; `copies` has room for a unit a thread */
void revtrain_pool(float *x, whole units, whole C, whole H, whole W, whole r, int back, float *copies, int threads) {
  whole unit = C * H * W;
#pragma omp parallel for PARALLEL(units * unit)
  for (int t = 0; t < threads; t++)
    for (whole u = units * t / threads; u < units * (t + 1) / threads; u++)
      pool_unit(x + u * unit, copies + t * unit, C, H, W, r, back);
}
