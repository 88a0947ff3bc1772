/* Loops over elements for which torch needs several passes over memory.

   On elements of float32, or of bfloat16 where they may be "stored" ones, in memory or in a file; without the
   interpreter's lock. A file's are read a batch at a time into memory that stays in a core's cache. No operation is
   contracted or reordered, so the bits are those of the torch operations in whose place they are, whatever the
   processor. soups/merging/kernels.py is the only caller and says what the functions are for. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(_MSC_VER)
#define restrict __restrict
#endif
#if defined(_WIN32)
#define HAS_PREAD 0
#else
#define HAS_PREAD 1
#include <errno.h>
#include <unistd.h>
#endif

/* Where the loader can choose, one copy of a loop for each width of vectors. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && (__GNUC__ >= 12 || __clang_major__ >= 17)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline
#endif

/* Elements of a model that are worked on at a time: with those of some ten models they stay in a core's nearest cache.
   The lanes of a sum of magnitudes, too, so this is a part of what sums are (see soups.merging.kernels.block_sums). */
enum { PIECE = 1024 };

/* To be raised when functions come or change; kernels.py knows the one it is written for. */
enum { VERSION = 2 };

typedef union {
    float number;
    uint32_t bits;
} Float;

/* ---- elements as they are stored ---- */

typedef struct {
    const void *data; /* NULL: in a file, or none */
    int narrow;       /* bfloat16, else float32 */
    int descriptor;   /* of a file; −1: none */
    int64_t offset;   /* of the first element in the file, in bytes */
} Stored;

/* Make a batch's elements lie in memory, in `room` if they are in a file. */
static int load(const Stored *source, Py_ssize_t start, Py_ssize_t count, void *room, Stored *out) {
    const Py_ssize_t size = source->narrow ? 2 : 4;
    *out = *source;
    if (source->data || source->descriptor < 0) {
        out->data = source->data ? (const char *)source->data + start * size : NULL;
        return 1;
    }
#if HAS_PREAD
    char *to = room;
    int64_t offset = source->offset + (int64_t)start * size;
    for (size_t left = (size_t)(count * size); left;) {
        const ssize_t got = pread(source->descriptor, to, left, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        to += got;
        offset += got;
        left -= (size_t)got;
    }
    out->data = room;
    return 1;
#else
    (void)count;
    (void)room;
    return 0;
#endif
}

INLINE void widen(const uint16_t *restrict from, float *restrict to, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        Float value = {.bits = (uint32_t)from[i] << 16};
        to[i] = value.number;
    }
}

/* Return elements from `start` on in float32: themselves, or widened into `room`. */
INLINE const float *floats(Stored source, Py_ssize_t start, Py_ssize_t count, float *room) {
    if (!source.narrow) return (const float *)source.data + start;
    widen((const uint16_t *)source.data + start, room, count);
    return room;
}

/* Round to the nearest bfloat16, to even halfway. */
INLINE void narrow(const float *restrict from, uint16_t *restrict to, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        Float value = {.number = from[i]};
        const uint32_t rounded = (value.bits + 0x7FFFu + (value.bits >> 16 & 1u)) >> 16;
        to[i] = (uint16_t)((value.bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }
}

CLONES void soups_narrow(const float *from, uint16_t *to, Py_ssize_t count) { narrow(from, to, count); }

INLINE void subtract_narrow(const uint16_t *restrict model, const float *restrict base, float *restrict out,
                            Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        Float value = {.bits = (uint32_t)model[i] << 16};
        out[i] = value.number - base[i];
    }
}

INLINE void subtract_wide(const float *restrict model, const float *restrict base, float *restrict out,
                          Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) out[i] = model[i] - base[i];
}

/* Return a task vector from `start` on: the model itself where there is no base, else their difference, in `room`. */
INLINE const float *task_vector(Stored model, const float *base, Py_ssize_t start, Py_ssize_t count, float *room) {
    if (!base) return floats(model, start, count, room);
    if (model.narrow)
        subtract_narrow((const uint16_t *)model.data + start, base, room, count);
    else
        subtract_wide((const float *)model.data + start, base, room, count);
    return room;
}

/* ---- what a transform does to a piece: soups.merging.kernels.Choice ---- */

typedef struct {
    float limits[4];
    int64_t places[2];
    float divisor, factor;
    const uint8_t *mask; /* NULL: none */
} Choice;

INLINE void shrink(const float *source, float limit, float *out, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) out[i] = fabsf(source[i]) <= limit ? 0.0f : source[i]; /* NaN stays */
}

INLINE void subtract_outliers(const float *source, float limit, float *out, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) out[i] -= fabsf(source[i]) <= limit ? 0.0f : source[i];
}

INLINE Py_ssize_t within(int64_t place, Py_ssize_t start, Py_ssize_t count) {
    int64_t here = place - (int64_t)start;
    return here < 0 ? 0 : (here > (int64_t)count ? count : (Py_ssize_t)here);
}

INLINE int keeps_all(const Choice *choice) {
    return choice->limits[0] < 0 && choice->limits[1] < 0 && choice->limits[2] == INFINITY;
}

INLINE int does_nothing(const Choice *choice, float weight) {
    return keeps_all(choice) && !choice->mask && choice->divisor == 1.0f && choice->factor == 1.0f && weight == 1.0f;
}

/* `out` may not be `source`; `start` is the piece's place in its chunk. */
INLINE void transform(const float *restrict source, const Choice *choice, float weight, Py_ssize_t start,
                      float *restrict out, Py_ssize_t count) {
    const float *limits = choice->limits;
    const uint8_t *restrict mask = choice->mask ? choice->mask + start : NULL;
    const float divisor = choice->divisor, factor = choice->factor;
    if (keeps_all(choice)) {
        if (mask)
            for (Py_ssize_t i = 0; i < count; i++) out[i] = source[i] * (float)mask[i];
        else
            for (Py_ssize_t i = 0; i < count; i++) out[i] = source[i];
    } else {
        Py_ssize_t here = within(choice->places[0], start, count);
        shrink(source, limits[0], out, here);
        shrink(source + here, limits[1], out + here, count - here);
        if (limits[2] < INFINITY) {
            here = within(choice->places[1], start, count);
            subtract_outliers(source, limits[2], out, here);
            subtract_outliers(source + here, limits[3], out + here, count - here);
        }
        if (mask)
            for (Py_ssize_t i = 0; i < count; i++) out[i] *= (float)mask[i];
    }
    if (divisor != 1.0f)
        for (Py_ssize_t i = 0; i < count; i++) out[i] /= divisor;
    if (factor != 1.0f || weight != 1.0f)
        for (Py_ssize_t i = 0; i < count; i++) out[i] = out[i] * factor * weight;
}

/* ---- the loops ---- */

/* out = model − base. */
CLONES void soups_difference(Stored model, const float *base, float *out, Py_ssize_t count) {
    if (model.narrow)
        subtract_narrow((const uint16_t *)model.data, base, out, count);
    else
        subtract_wide((const float *)model.data, base, out, count);
}

/* Elements whose sum stays in registers while the models are gone through. */
enum { STRIP = 64 };

INLINE void add_strip(Stored model, Stored base, const float *restrict origin, float weight, int first,
                      Py_ssize_t start, float *restrict total, Py_ssize_t count) {
    float term[STRIP];
    if (model.narrow)
        widen((const uint16_t *)model.data + start, term, count);
    else
        memcpy(term, (const float *)model.data + start, (size_t)count * sizeof *term);
    if (base.data)
        for (Py_ssize_t i = 0; i < count; i++) term[i] -= origin[i];
    if (first)
        for (Py_ssize_t i = 0; i < count; i++) total[i] = term[i] * weight;
    else
        for (Py_ssize_t i = 0; i < count; i++) total[i] += term[i] * weight;
}

INLINE void sum_strip(const Stored *models, Py_ssize_t number, Stored base, const float *weights, float divisor,
                      float factor, Py_ssize_t start, void *out, int out_narrow, Py_ssize_t count) {
    float total[STRIP], origin[STRIP];
    if (base.data) {
        if (base.narrow)
            widen((const uint16_t *)base.data + start, origin, count);
        else
            memcpy(origin, (const float *)base.data + start, (size_t)count * sizeof *origin);
    }
    add_strip(models[0], base, origin, weights[0], 1, start, total, count);
    for (Py_ssize_t model = 1; model < number; model++)
        add_strip(models[model], base, origin, weights[model], 0, start, total, count);
    if (divisor != 1.0f)
        for (Py_ssize_t i = 0; i < count; i++) total[i] /= divisor;
    if (factor != 1.0f)
        for (Py_ssize_t i = 0; i < count; i++) total[i] *= factor;
    if (base.data)
        for (Py_ssize_t i = 0; i < count; i++) total[i] += origin[i];
    if (out_narrow)
        narrow(total, (uint16_t *)out + start, count);
    else
        memcpy((float *)out + start, total, (size_t)count * sizeof *total);
}

/* out = Σ weight · model / divisor · factor, added from the left; with a base, of task vectors, and it is added. */
CLONES void soups_sum(const Stored *models, Py_ssize_t number, Stored base, const float *weights, float divisor,
                      float factor, void *out, int out_narrow, Py_ssize_t count) {
    Py_ssize_t start = 0;
    if (!number) return;
    for (; start + STRIP <= count; start += STRIP)
        sum_strip(models, number, base, weights, divisor, factor, start, out, out_narrow, STRIP);
    if (start < count) sum_strip(models, number, base, weights, divisor, factor, start, out, out_narrow, count - start);
}

/* The same of float32 models, and in float64 until the result is rounded: soups.reduction says when. */
INLINE void sum_strip_wide(const Stored *models, Py_ssize_t number, const double *weights, double divisor,
                           Py_ssize_t start, void *out, int out_narrow, Py_ssize_t count) {
    double total[STRIP];
    float rounded[STRIP];
    const float *restrict first = (const float *)models[0].data + start;
    for (Py_ssize_t i = 0; i < count; i++) total[i] = (double)first[i] * weights[0];
    for (Py_ssize_t model = 1; model < number; model++) {
        const float *restrict values = (const float *)models[model].data + start;
        const double weight = weights[model];
        for (Py_ssize_t i = 0; i < count; i++) total[i] += (double)values[i] * weight;
    }
    if (divisor != 1.0)
        for (Py_ssize_t i = 0; i < count; i++) total[i] /= divisor;
    for (Py_ssize_t i = 0; i < count; i++) rounded[i] = (float)total[i];
    if (out_narrow)
        narrow(rounded, (uint16_t *)out + start, count);
    else
        memcpy((float *)out + start, rounded, (size_t)count * sizeof *rounded);
}

/* out = Σ weight · model / divisor, added from the left. */
CLONES void soups_sum_wide(const Stored *models, Py_ssize_t number, const double *weights, double divisor, void *out,
                           int out_narrow, Py_ssize_t count) {
    Py_ssize_t start = 0;
    if (!number) return;
    for (; start + STRIP <= count; start += STRIP)
        sum_strip_wide(models, number, weights, divisor, start, out, out_narrow, STRIP);
    if (start < count) sum_strip_wide(models, number, weights, divisor, start, out, out_narrow, count - start);
}

INLINE float sum_of_lanes(float *lanes) {
    for (Py_ssize_t width = PIECE / 2; width; width /= 2)
        for (Py_ssize_t i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* Sums of magnitudes before and after a transform, one of each for each block: soups.merging.kernels.block_sums. */
CLONES void soups_block_norms(Stored model, Stored base, const Choice *choice, Py_ssize_t block, float *before,
                              float *after, Py_ssize_t count) {
    float reference[PIECE], room[PIECE], left[PIECE], whole[PIECE], rest[PIECE];
    for (Py_ssize_t first = 0; first < count; first += block) {
        const Py_ssize_t end = count - first < block ? count : first + block;
        memset(whole, 0, sizeof whole);
        memset(rest, 0, sizeof rest);
        for (Py_ssize_t start = first; start < end; start += PIECE) {
            const Py_ssize_t size = end - start < PIECE ? end - start : PIECE;
            const float *source =
                task_vector(model, base.data ? floats(base, start, size, reference) : NULL, start, size, room);
            transform(source, choice, 1.0f, start, left, size);
            for (Py_ssize_t i = 0; i < size; i++) whole[i] += fabsf(source[i]);
            for (Py_ssize_t i = 0; i < size; i++) rest[i] += fabsf(left[i]);
        }
        *before++ = sum_of_lanes(whole);
        *after++ = sum_of_lanes(rest);
    }
}

typedef struct {
    int elect, vote; /* whether signs are elected, whether weights vote */
    float tie;       /* the sign where the votes cancel */
    int reduce;      /* 0: the sum; 1: divided by the weights of who agrees; 2: by how many agree, or are not zero */
    float denominator, factor;
} Merge;

static const float SMALLEST_DIVISOR = 1e-8f;

/* out = base + factor · reduce(consensus(transform(task vectors))); `work` has room for models + 2 pieces, `taus` for
   as many pointers as there are models. */
CLONES void soups_task_vectors(const Stored *models, Py_ssize_t number, Stored base, int deltas, const Choice *choices,
                               const float *weights, const Merge *merge, const float **taus, float *work, float *out,
                               Py_ssize_t count) {
    float room[PIECE], reference[PIECE];
    float *restrict divisor = work, *restrict sign = work + PIECE;
    for (Py_ssize_t start = 0; start < count; start += PIECE) {
        const Py_ssize_t size = count - start < PIECE ? count - start : PIECE;
        const float *restrict origin = floats(base, start, size, reference);
        float *restrict total = out + start;
        for (Py_ssize_t i = 0; i < size; i++) total[i] = divisor[i] = 0.0f;
        for (Py_ssize_t model = 0; model < number; model++) {
            float *own = work + (model + 2) * PIECE;
            const float weight = weights[model], voting = merge->elect && merge->vote ? weight : 1.0f;
            const int as_it_is = does_nothing(&choices[model], voting);
            const float *source =
                task_vector(models[model], deltas ? NULL : origin, start, size, as_it_is ? own : room);
            if (!as_it_is) transform(source, &choices[model], voting, start, own, size);
            const float *restrict tau = taus[model] = as_it_is ? source : own;
            if (merge->elect) {
                if (model)
                    for (Py_ssize_t i = 0; i < size; i++) sign[i] += tau[i];
                else
                    for (Py_ssize_t i = 0; i < size; i++) sign[i] = tau[i];
                continue;
            }
            if (merge->reduce == 2)
                for (Py_ssize_t i = 0; i < size; i++) divisor[i] += tau[i] == 0.0f ? 0.0f : 1.0f;
            if (model)
                for (Py_ssize_t i = 0; i < size; i++) total[i] += tau[i] * weight;
            else
                for (Py_ssize_t i = 0; i < size; i++) total[i] = tau[i] * weight;
        }
        if (merge->elect) {
            const float tie = merge->tie;
            for (Py_ssize_t i = 0; i < size; i++) sign[i] = sign[i] > 0.0f ? 1.0f : sign[i] < 0.0f ? -1.0f : tie;
            for (Py_ssize_t model = 0; model < number; model++) {
                const float *restrict tau = taus[model];
                const float weight = merge->vote ? 1.0f : weights[model];
                const float share = merge->reduce == 2 ? 1.0f : weights[model];
                if (merge->reduce) {
                    for (Py_ssize_t i = 0; i < size; i++) {
                        const float agreeing = tau[i] * sign[i];
                        total[i] += (agreeing <= 0.0f ? 0.0f : agreeing) * weight; /* NaN goes on into the total */
                        divisor[i] += agreeing > 0.0f ? share : 0.0f;
                    }
                } else {
                    for (Py_ssize_t i = 0; i < size; i++) {
                        const float agreeing = tau[i] * sign[i];
                        total[i] += (agreeing <= 0.0f ? 0.0f : agreeing) * weight;
                    }
                }
            }
            for (Py_ssize_t i = 0; i < size; i++) total[i] *= sign[i];
        }
        if (merge->reduce == 2) {
            for (Py_ssize_t i = 0; i < size; i++) total[i] /= divisor[i] < 1.0f ? 1.0f : divisor[i];
        } else if (merge->reduce == 1) {
            for (Py_ssize_t i = 0; i < size; i++) total[i] /= fabsf(divisor[i]) < SMALLEST_DIVISOR ? 1.0f : divisor[i];
        } else if (merge->denominator != 1.0f) {
            const float denominator = merge->denominator;
            for (Py_ssize_t i = 0; i < size; i++) total[i] /= denominator;
        }
        const float factor = merge->factor;
        for (Py_ssize_t i = 0; i < size; i++) total[i] = total[i] * factor + origin[i];
    }
}

/* ---- NumPy's PCG64DXSM (O'Neill, HMC-CS-2014-0905) ---- */

enum { LANES = 4, BATCH = 64 }; /* stretches of words at once, words of each before they are used */

static const uint64_t MULTIPLIER = 0xDA942042E4DD58B5u;

INLINE uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    return (uint64_t)(((unsigned __int128)a * b) >> 64);
#else
    const uint64_t a0 = a & 0xFFFFFFFFu, a1 = a >> 32, b0 = b & 0xFFFFFFFFu, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xFFFFFFFFu);
    return a1 * b1 + (middle >> 32) + (other >> 32);
#endif
}

typedef struct {
    uint64_t high, low;
} State;

/* Modulo 2¹²⁸. */
INLINE State product(State a, State b) {
    State result = {a.high * b.low + a.low * b.high + high_product(a.low, b.low), a.low * b.low};
    return result;
}

INLINE State sum(State a, State b) {
    State result = {a.high + b.high, a.low + b.low};
    result.high += result.low < a.low;
    return result;
}

/* Return the state after so many words: a step is state · multiplier + increment, and so are two, four, … at once. */
static State after(State state, State increment, uint64_t steps) {
    State factor = {0, MULTIPLIER}, one = {0, 1};
    for (; steps; steps >>= 1) {
        if (steps & 1) state = sum(product(state, factor), increment);
        increment = product(increment, sum(factor, one));
        factor = product(factor, factor);
    }
    return state;
}

INLINE uint64_t next_word(State *state, State increment) {
    uint64_t high = state->high;
    const uint64_t low = state->low | 1u, old = state->low * MULTIPLIER;
    high ^= high >> 32;
    high *= MULTIPLIER;
    high ^= high >> 48;
    state->high = state->high * MULTIPLIER + high_product(state->low, MULTIPLIER) + increment.high;
    state->low = old + increment.low;
    state->high += state->low < old;
    return high * low;
}

typedef struct {
    State state, increment;
    uint64_t first;         /* how many numbers come before the chunk's */
    const uint16_t *limits; /* one for all numbers, or one for each */
    int each;
} Draw;

/* out[i] = (16-bit number `start + i`) < limit.

   Each word holds four numbers, the lowest first. A word depends on the one before it: four stretches at once keep the
   multipliers busy. */
CLONES void soups_draw(const Draw *draw, Py_ssize_t start, uint8_t *out, Py_ssize_t count) {
    uint64_t words[LANES][BATCH];
    uint16_t numbers[4 * BATCH];
    const uint64_t number = draw->first + (uint64_t)start;
    const Py_ssize_t skip = (Py_ssize_t)(number % 4);
    const Py_ssize_t length = (skip + count + 4 * LANES - 1) / (4 * LANES);
    const State increment = draw->increment;
    State a = after(draw->state, increment, number / 4);
    State b = after(a, increment, (uint64_t)length);
    State c = after(b, increment, (uint64_t)length);
    State d = after(c, increment, (uint64_t)length);
    for (Py_ssize_t first = 0; first < length; first += BATCH) {
        const Py_ssize_t batch = length - first < BATCH ? length - first : BATCH;
        for (Py_ssize_t i = 0; i < batch; i++) {
            words[0][i] = next_word(&a, increment);
            words[1][i] = next_word(&b, increment);
            words[2][i] = next_word(&c, increment);
            words[3][i] = next_word(&d, increment);
        }
        for (int lane = 0; lane < LANES; lane++) {
            const Py_ssize_t place = 4 * (lane * length + first) - skip; /* of the stretch's first number in `out` */
            const Py_ssize_t from = place < 0 ? -place : 0;
            const Py_ssize_t until = count - place < 4 * batch ? count - place : 4 * batch;
            if (from >= until) continue;
            memcpy(numbers, words[lane], (size_t)batch * sizeof(uint64_t));
            uint8_t *restrict kept = out + place;
            if (draw->each) {
                const uint16_t *restrict bound = draw->limits + start + place;
                for (Py_ssize_t i = from; i < until; i++) kept[i] = numbers[i] < bound[i];
            } else {
                const uint16_t bound = draw->limits[0];
                for (Py_ssize_t i = from; i < until; i++) kept[i] = numbers[i] < bound;
            }
        }
    }
}

/* ---- masks: bytes of 0 or 1 where they are used; eight to a byte, the first the lowest bit, where they are kept ---- */

static void pack(const uint8_t *bytes, uint8_t *bits, Py_ssize_t count) {
    Py_ssize_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t eight;
        memcpy(&eight, bytes + i, 8);
        bits[i / 8] = (uint8_t)(eight * 0x0102040810204080u >> 56);
    }
    if (i < count) {
        bits[i / 8] = 0;
        for (; i < count; i++) bits[i / 8] |= (uint8_t)(bytes[i] << (i % 8));
    }
}

static void unpack(const uint8_t *bits, uint8_t *bytes, Py_ssize_t count) {
    Py_ssize_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t eight = bits[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
        eight = (eight + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
        memcpy(bytes + i, &eight, 8);
    }
    for (; i < count; i++) bytes[i] = bits[i / 8] >> (i % 8) & 1;
}

typedef struct {
    const uint8_t *bits; /* NULL: drawn, or none */
    int drawn;
    Draw draw;
} Mask;

/* Return a batch's mask as bytes, or NULL where everything is kept; `start` is a multiple of eight. */
static const uint8_t *mask_bytes(const Mask *mask, Py_ssize_t start, Py_ssize_t count, uint8_t *room) {
    if (mask->bits)
        unpack(mask->bits + start / 8, room, count);
    else if (mask->drawn)
        soups_draw(&mask->draw, start, room, count);
    else
        return NULL;
    return room;
}

/* ---- selection on bit patterns ---- */

static const uint32_t MAGNITUDE = 0x7FFFFFFFu;

INLINE uint32_t bits_of(float number) {
    Float value = {.number = number};
    return value.bits & MAGNITUDE;
}

static void count_digits(const float *values, int shift, int some, uint32_t prefix, int64_t *counts, Py_ssize_t count) {
    if (!some)
        for (Py_ssize_t i = 0; i < count; i++) counts[bits_of(values[i]) >> shift]++;
    else
        for (Py_ssize_t i = 0; i < count; i++) {
            const uint32_t bits = bits_of(values[i]) >> shift;
            if (bits >> 16 == prefix) counts[bits & 0xFFFFu]++;
        }
}

CLONES Py_ssize_t soups_how_many_equal(const float *values, float wanted, Py_ssize_t count) {
    int64_t found = 0;
    for (Py_ssize_t i = 0; i < count; i++) found += values[i] == wanted;
    return (Py_ssize_t)found;
}

/* A number is finite unless all bits of its exponent are set. */
CLONES int soups_all_finite(const void *values, int are_narrow, Py_ssize_t count) {
    const uint16_t *restrict halves = values;
    const uint32_t *restrict wholes = values;
    uint32_t found = 0;
    if (are_narrow)
        for (Py_ssize_t i = 0; i < count; i++) found |= (halves[i] & 0x7F80u) == 0x7F80u;
    else
        for (Py_ssize_t i = 0; i < count; i++) found |= (wholes[i] & 0x7F800000u) == 0x7F800000u;
    return !found;
}

/* Each row's magnitudes and places, packed into integers whose order is that of the magnitudes. */
CLONES void soups_pack_places(const float *values, Py_ssize_t width, int64_t *out, Py_ssize_t count) {
    for (Py_ssize_t start = 0; start < count; start += width)
        for (Py_ssize_t i = 0; i < width; i++)
            out[start + i] = (int64_t)((uint64_t)bits_of(values[start + i]) << 32 | (uint64_t)i);
}

/* Return whether every place was in its row. */
static int unpack_places(const int64_t *packed, const int32_t *table, Py_ssize_t width, int32_t *out,
                         Py_ssize_t count) {
    int fine = 1;
    for (Py_ssize_t start = 0; start < count; start += width)
        for (Py_ssize_t rank = 0; rank < width; rank++) {
            const Py_ssize_t place = (Py_ssize_t)(packed[start + rank] & 0xFFFFFFFF);
            if (place < width)
                out[start + place] = table[rank];
            else
                fine = 0;
        }
    return fine;
}

/* ---- the Python side ---- */

typedef struct {
    Py_buffer *views;
    Py_ssize_t count;
} Views;

static void release_all(Views *views) {
    for (Py_ssize_t i = 0; i < views->count; i++) PyBuffer_Release(&views->views[i]);
    PyMem_Free(views->views);
    views->views = NULL;
    views->count = 0;
}

/* Buffers to be written to. */
static int acquire_all(PyObject *sequence, Views *views) {
    const Py_ssize_t count = PySequence_Size(sequence);
    if (count < 0) return 0;
    views->views = PyMem_Malloc((size_t)(count ? count : 1) * sizeof(Py_buffer));
    if (!views->views) {
        PyErr_NoMemory();
        return 0;
    }
    for (; views->count < count; views->count++) {
        PyObject *item = PySequence_GetItem(sequence, views->count);
        const int failed =
            !item || PyObject_GetBuffer(item, &views->views[views->count], PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0;
        Py_XDECREF(item);
        if (failed) return 0;
    }
    return 1;
}

/* Check a buffer's length: a mistake of the caller must not become a read outside of it. */
static int holds(const Py_buffer *view, Py_ssize_t bytes, const char *name) {
    if (view->len == bytes) return 1;
    PyErr_Format(PyExc_ValueError, "%s: %zd bytes, expected %zd", name, view->len, bytes);
    return 0;
}

static int stored(const Py_buffer *view, Py_ssize_t count, const char *name, Stored *out) {
    *out = (Stored){view->buf, view->itemsize == 2, -1, 0};
    if (view->itemsize != 2 && view->itemsize != 4) {
        PyErr_Format(PyExc_ValueError, "%s: elements of %zd bytes, expected 2 or 4", name, view->itemsize);
        return 0;
    }
    return holds(view, count * view->itemsize, name);
}

/* Everything that a call takes for several models: buffers are kept until the end. */
typedef struct {
    Views views;
    Py_ssize_t number;
    Stored *models, *batch;
    Mask *masks;
    Choice *choices;
} Models;

static void release_models(Models *models) {
    release_all(&models->views);
    PyMem_Free(models->models);
    PyMem_Free(models->batch);
    PyMem_Free(models->masks);
    PyMem_Free(models->choices);
}

/* Take an item that is a buffer: all views are allocated beforehand. */
static int view_of(PyObject *item, Views *views, Py_buffer **out) {
    *out = &views->views[views->count];
    if (PyObject_GetBuffer(item, *out, PyBUF_C_CONTIGUOUS) < 0) return 0;
    views->count++;
    return 1;
}

/* A model is a buffer, or (descriptor, offset in bytes, bytes of an element). */
static int parse_model(PyObject *item, Py_ssize_t count, Views *views, Stored *out) {
    Py_buffer *view;
    if (!PyTuple_Check(item)) return view_of(item, views, &view) && stored(view, count, "model", out);
    int descriptor, size;
    long long offset;
    if (!PyArg_ParseTuple(item, "iLi", &descriptor, &offset, &size)) return 0;
    if (descriptor < 0 || offset < 0 || (size != 2 && size != 4) || !HAS_PREAD) {
        PyErr_SetString(PyExc_ValueError, "model: no place in a file that can be read here");
        return 0;
    }
    *out = (Stored){NULL, size == 2, descriptor, offset};
    return 1;
}

/* A mask is None, a buffer of bits, or (state and increment, numbers before, limits). */
static int parse_mask(PyObject *item, Py_ssize_t count, Views *views, Mask *out) {
    Py_buffer *view;
    memset(out, 0, sizeof *out);
    if (item == Py_None) return 1;
    if (!PyTuple_Check(item)) {
        if (!view_of(item, views, &view) || !holds(view, (count + 7) / 8, "mask")) return 0;
        out->bits = view->buf;
        return 1;
    }
    PyObject *state, *limits;
    unsigned long long first;
    if (!PyArg_ParseTuple(item, "OKO", &state, &first, &limits)) return 0;
    if (!view_of(state, views, &view) || !holds(view, 32, "state")) return 0;
    memcpy(&out->draw.state, view->buf, 16);
    memcpy(&out->draw.increment, (char *)view->buf + 16, 16);
    if (!view_of(limits, views, &view) || (view->len != 2 && !holds(view, 2 * count, "limits"))) return 0;
    out->draw.limits = view->buf;
    out->draw.each = view->len != 2;
    out->draw.first = first;
    out->drawn = 1;
    return 1;
}

/* `base` comes after the models; NULL: there is none. `transforms` is (limits, places, scales, masks), or NULL. */
static int parse_models(PyObject *sequence, PyObject *base, PyObject *transforms, Py_ssize_t count, Models *out) {
    memset(out, 0, sizeof *out);
    const Py_ssize_t number = out->number = PySequence_Size(sequence);
    if (number < 0) return 0;
    out->views.views = PyMem_Malloc((size_t)(3 * number + 4) * sizeof(Py_buffer));
    out->models = PyMem_Malloc((size_t)(number + 1) * sizeof(Stored));
    out->batch = PyMem_Malloc((size_t)(number + 1) * sizeof(Stored));
    out->masks = PyMem_Malloc((size_t)(number + 1) * sizeof(Mask));
    out->choices = PyMem_Malloc((size_t)(number + 1) * sizeof(Choice));
    if (!out->views.views || !out->models || !out->batch || !out->masks || !out->choices) {
        PyErr_NoMemory();
        return 0;
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        const int fine = item && parse_model(item, count, &out->views, &out->models[i]);
        Py_XDECREF(item);
        if (!fine) return 0;
    }
    out->models[number] = (Stored){NULL, 0, -1, 0};
    if (base && base != Py_None && !parse_model(base, count, &out->views, &out->models[number])) return 0;
    if (!transforms) return 1;
    PyObject *limit_item, *place_item, *scale_item, *mask_items;
    Py_buffer *limits, *places, *scales;
    if (!PyArg_ParseTuple(transforms, "OOOO", &limit_item, &place_item, &scale_item, &mask_items)) return 0;
    if (!view_of(limit_item, &out->views, &limits) || !holds(limits, number * 16, "limits")) return 0;
    if (!view_of(place_item, &out->views, &places) || !holds(places, number * 16, "places")) return 0;
    if (!view_of(scale_item, &out->views, &scales) || !holds(scales, number * 8, "scales")) return 0;
    for (Py_ssize_t i = 0; i < number; i++) {
        PyObject *item = PySequence_GetItem(mask_items, i);
        const int fine = item && parse_mask(item, count, &out->views, &out->masks[i]);
        Py_XDECREF(item);
        if (!fine) return 0;
        Choice *choice = &out->choices[i];
        memcpy(choice->limits, (char *)limits->buf + 16 * i, 16);
        memcpy(choice->places, (char *)places->buf + 16 * i, 16);
        choice->divisor = ((float *)scales->buf)[2 * i];
        choice->factor = ((float *)scales->buf)[2 * i + 1];
        choice->mask = NULL;
    }
    return 1;
}

/* Bytes of working memory for a batch: elements of the models, of the base and of the result, pieces of task vectors,
 * masks. */
static Py_ssize_t working(Py_ssize_t number, Py_ssize_t batch) {
    return (number + 2) * batch * 4 + (number + 2) * PIECE * 4 + number * batch;
}

static float *pieces_in(char *room, Py_ssize_t number, Py_ssize_t batch) {
    return (float *)(room + (number + 2) * batch * 4);
}

static uint8_t *masks_in(char *room, Py_ssize_t number, Py_ssize_t batch) {
    return (uint8_t *)(pieces_in(room, number, batch) + (number + 2) * PIECE);
}

/* Where a batch's result is made: where it stays, if that is float32. */
static float *result_in(const Py_buffer *out, Py_ssize_t start, char *room, Py_ssize_t number, Py_ssize_t batch) {
    return out->itemsize == 4 ? (float *)out->buf + start : (float *)(room + (number + 1) * batch * 4);
}

static void keep_result(const Py_buffer *out, Py_ssize_t start, const float *result, Py_ssize_t count) {
    if (out->itemsize == 2) soups_narrow(result, (uint16_t *)out->buf + start, count);
}

/* Return how many elements the result has, −1 with an error if it is neither float32 nor bfloat16. */
static Py_ssize_t result_size(const Py_buffer *out) {
    if (out->itemsize == 2 || out->itemsize == 4) return out->len / out->itemsize;
    PyErr_Format(PyExc_ValueError, "out: elements of %zd bytes, expected 2 or 4", out->itemsize);
    return -1;
}

/* Load a batch of every model and of the base, and its masks; return the row that could not be read, or −1. */
static Py_ssize_t load_batch(Models *models, Py_ssize_t start, Py_ssize_t count, Py_ssize_t batch, char *room) {
    for (Py_ssize_t i = 0; i <= models->number; i++)
        if (!load(&models->models[i], start, count, room + i * batch * 4, &models->batch[i])) return i;
    return -1;
}

/* A choice, for a batch that begins at `start`. */
static Choice in_batch(const Models *models, Py_ssize_t i, Py_ssize_t start, Py_ssize_t count, Py_ssize_t batch,
                       char *room) {
    Choice choice = models->choices[i];
    choice.places[0] -= start;
    choice.places[1] -= start;
    choice.mask = mask_bytes(&models->masks[i], start, count, masks_in(room, models->number, batch) + i * batch);
    return choice;
}

static PyObject *finished(int fine) {
    if (fine) Py_RETURN_NONE;
    return NULL;
}

/* None, or the number of the row that could not be read. */
static PyObject *unread(int fine, Py_ssize_t row) {
    if (fine && row >= 0) return PyLong_FromSsize_t(row);
    return finished(fine);
}

static PyObject *py_difference(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer model, base, out;
    Stored source;
    if (!PyArg_ParseTuple(arguments, "y*y*w*", &model, &base, &out)) return NULL;
    const Py_ssize_t count = out.len / 4;
    const int fine = stored(&model, count, "model", &source) && holds(&base, out.len, "base");
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        soups_difference(source, base.buf, out.buf, count);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&model);
    PyBuffer_Release(&base);
    PyBuffer_Release(&out);
    return finished(fine);
}

static PyObject *py_weighted_sum(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *sequence;
    Py_buffer weights, room, out;
    double divisor;
    Py_ssize_t batch, bad = -1;
    Models models = {0};
    if (!PyArg_ParseTuple(arguments, "Oy*dnw*w*", &sequence, &weights, &divisor, &batch, &room, &out)) return NULL;
    const Py_ssize_t count = result_size(&out);
    int fine = count >= 0 && parse_models(sequence, NULL, NULL, count, &models) &&
               holds(&weights, models.number * 8, "weights") && batch > 0 &&
               holds(&room, working(models.number, batch), "room");
    Py_ssize_t narrows = 0;
    for (Py_ssize_t i = 0; fine && i < models.number; i++) narrows += models.models[i].narrow;
    if (fine && narrows && narrows != models.number) {
        PyErr_SetString(PyExc_ValueError, "models: expected elements of one dtype");
        fine = 0;
    }
    float *factors = fine ? PyMem_Malloc((size_t)(models.number + 1) * sizeof(float)) : NULL;
    if (fine && !factors) {
        PyErr_NoMemory();
        fine = 0;
    }
    if (fine) {
        const double *exact = weights.buf;
        for (Py_ssize_t i = 0; i < models.number; i++) factors[i] = (float)exact[i];
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t start = 0; start < count && bad < 0; start += batch) {
            const Py_ssize_t size = count - start < batch ? count - start : batch;
            char *result = (char *)out.buf + start * out.itemsize;
            bad = load_batch(&models, start, size, batch, room.buf);
            if (bad >= 0) break;
            if (narrows)
                soups_sum(models.batch, models.number, models.batch[models.number], factors, (float)divisor, 1.0f,
                          result, out.itemsize == 2, size);
            else
                soups_sum_wide(models.batch, models.number, exact, divisor, result, out.itemsize == 2, size);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(factors);
    release_models(&models);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&room);
    PyBuffer_Release(&out);
    return unread(fine, bad);
}

static PyObject *py_block_norms(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *sequence, *base, *transforms, *kept_items;
    Py_buffer before, after, room;
    Py_ssize_t count, block, batch, bad = -1;
    Models models = {0};
    Views kept = {NULL, 0};
    if (!PyArg_ParseTuple(arguments, "OOO!Onnnw*w*w*", &sequence, &base, &PyTuple_Type, &transforms, &kept_items,
                          &count, &block, &batch, &before, &after, &room))
        return NULL;
    int fine = parse_models(sequence, base, transforms, count, &models) && acquire_all(kept_items, &kept);
    if (fine && (count < 0 || block < 1 || batch < 1 || batch % block || batch % 8)) {
        PyErr_SetString(PyExc_ValueError, "batch: expected whole blocks, and a multiple of eight");
        fine = 0;
    }
    const Py_ssize_t blocks = fine ? (count + block - 1) / block : 0;
    fine = fine && holds(&before, models.number * blocks * 4, "before") &&
           holds(&after, models.number * blocks * 4, "after") && holds(&room, working(models.number, batch), "room");
    if (fine && kept.count && kept.count != models.number) {
        PyErr_SetString(PyExc_ValueError, "kept: expected one for each model");
        fine = 0;
    }
    for (Py_ssize_t i = 0; fine && i < kept.count; i++) fine = holds(&kept.views[i], (count + 7) / 8, "kept");
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t start = 0; start < count && bad < 0; start += batch) {
            const Py_ssize_t size = count - start < batch ? count - start : batch;
            bad = load_batch(&models, start, size, batch, room.buf);
            for (Py_ssize_t i = 0; bad < 0 && i < models.number; i++) {
                const Choice choice = in_batch(&models, i, start, size, batch, room.buf);
                const Py_ssize_t place = i * blocks + start / block;
                soups_block_norms(models.batch[i], models.batch[models.number], &choice, block,
                                  (float *)before.buf + place, (float *)after.buf + place, size);
                if (kept.count && choice.mask) pack(choice.mask, (uint8_t *)kept.views[i].buf + start / 8, size);
            }
        }
        Py_END_ALLOW_THREADS;
    }
    release_models(&models);
    release_all(&kept);
    PyBuffer_Release(&before);
    PyBuffer_Release(&after);
    PyBuffer_Release(&room);
    return unread(fine, bad);
}

static PyObject *py_task_vectors(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *sequence, *base, *transforms;
    Py_buffer weights, room, out;
    Merge merge;
    Py_ssize_t batch, bad = -1;
    int deltas;
    Models models = {0};
    if (!PyArg_ParseTuple(arguments, "OOpO!y*ppfiffnw*w*", &sequence, &base, &deltas, &PyTuple_Type, &transforms,
                          &weights, &merge.elect, &merge.vote, &merge.tie, &merge.reduce, &merge.denominator,
                          &merge.factor, &batch, &room, &out))
        return NULL;
    const Py_ssize_t count = result_size(&out);
    int fine = count >= 0 && parse_models(sequence, base, transforms, count, &models) &&
               holds(&weights, models.number * 4, "weights");
    if (fine && (batch < 1 || batch % 8)) {
        PyErr_SetString(PyExc_ValueError, "batch: expected a multiple of eight");
        fine = 0;
    }
    const Py_ssize_t number = models.number;
    fine = fine && holds(&room, working(number, batch), "room");
    if (fine) {
        float *work = pieces_in(room.buf, number, batch);
        int plain = number > 0 && !deltas && !merge.elect && merge.reduce == 0; /* a sum of task vectors as they are */
        for (Py_ssize_t i = 0; i < number; i++)
            plain = plain && !models.masks[i].bits && !models.masks[i].drawn && does_nothing(&models.choices[i], 1.0f);
        Choice *choices = PyMem_Malloc((size_t)(number + 1) * sizeof(Choice));
        const float **taus = PyMem_Malloc((size_t)(number + 1) * sizeof(float *));
        if (!choices || !taus) {
            PyErr_NoMemory();
            fine = 0;
        } else {
            Py_BEGIN_ALLOW_THREADS;
            for (Py_ssize_t start = 0; start < count && bad < 0; start += batch) {
                const Py_ssize_t size = count - start < batch ? count - start : batch;
                bad = load_batch(&models, start, size, batch, room.buf);
                if (bad >= 0) break;
                if (plain) {
                    soups_sum(models.batch, number, models.batch[number], weights.buf, merge.denominator, merge.factor,
                              (char *)out.buf + start * out.itemsize, out.itemsize == 2, size);
                    continue;
                }
                for (Py_ssize_t i = 0; i < number; i++) choices[i] = in_batch(&models, i, start, size, batch, room.buf);
                float *result = result_in(&out, start, room.buf, number, batch);
                soups_task_vectors(models.batch, number, models.batch[number], deltas, choices, weights.buf, &merge,
                                   taus, work, result, size);
                keep_result(&out, start, result, size);
            }
            Py_END_ALLOW_THREADS;
        }
        PyMem_Free(choices);
        PyMem_Free(taus);
    }
    release_models(&models);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&room);
    PyBuffer_Release(&out);
    return unread(fine, bad);
}

static PyObject *py_draw(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer out;
    PyObject *item;
    Mask mask;
    Views views = {NULL, 0};
    if (!PyArg_ParseTuple(arguments, "O!w*", &PyTuple_Type, &item, &out)) return NULL;
    int fine = 1;
    if (!(views.views = PyMem_Malloc(2 * sizeof(Py_buffer)))) {
        PyErr_NoMemory();
        fine = 0;
    }
    fine = fine && parse_mask(item, out.len, &views, &mask);
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        soups_draw(&mask.draw, 0, out.buf, out.len);
        Py_END_ALLOW_THREADS;
    }
    release_all(&views);
    PyBuffer_Release(&out);
    return finished(fine);
}

static PyObject *py_count_digits(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer values, counts;
    int shift, some;
    unsigned int prefix;
    if (!PyArg_ParseTuple(arguments, "y*ipIw*", &values, &shift, &some, &prefix, &counts)) return NULL;
    int fine = holds(&counts, 8 << 16, "counts");
    if (fine && (shift < (some ? 0 : 15) || shift > 31)) {
        PyErr_SetString(PyExc_ValueError, "shift: the digit has more than 16 bits, or none");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        count_digits(values.buf, shift, some, prefix, counts.buf, values.len / 4);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&counts);
    return finished(fine);
}

static PyObject *py_place_of(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer values;
    float wanted;
    Py_ssize_t number;
    if (!PyArg_ParseTuple(arguments, "y*fn", &values, &wanted, &number)) return NULL;
    const float *elements = values.buf;
    const Py_ssize_t count = values.len / 4;
    Py_ssize_t found, place = -1;
    Py_BEGIN_ALLOW_THREADS;
    found = soups_how_many_equal(elements, wanted, count);
    if (number > 0 && found >= number) {
        Py_ssize_t left = number;
        while (left) left -= elements[++place] == wanted;
    }
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&values);
    return Py_BuildValue("nn", place, found);
}

static PyObject *py_all_finite(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer values;
    Stored source;
    if (!PyArg_ParseTuple(arguments, "y*", &values)) return NULL;
    const Py_ssize_t count = values.itemsize ? values.len / values.itemsize : 0;
    const int fine = stored(&values, count, "values", &source);
    int finite = 0;
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        finite = soups_all_finite(source.data, source.narrow, count);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&values);
    return fine ? PyBool_FromLong(finite) : NULL;
}

static PyObject *py_pack_places(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer values, out;
    Py_ssize_t width;
    if (!PyArg_ParseTuple(arguments, "y*nw*", &values, &width, &out)) return NULL;
    const Py_ssize_t count = values.len / 4;
    int fine = holds(&out, 8 * count, "out");
    if (fine && (width < 1 || count % width)) {
        PyErr_SetString(PyExc_ValueError, "width: the elements are no whole rows");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        soups_pack_places(values.buf, width, out.buf, count);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return finished(fine);
}

static PyObject *py_unpack_places(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer packed, table, out;
    if (!PyArg_ParseTuple(arguments, "y*y*w*", &packed, &table, &out)) return NULL;
    const Py_ssize_t width = table.len / 4, count = packed.len / 8;
    int fine = holds(&out, 4 * count, "out");
    if (fine && (width < 1 || count % width)) {
        PyErr_SetString(PyExc_ValueError, "table: the elements are no whole rows");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS;
        fine = unpack_places(packed.buf, table.buf, width, out.buf, count);
        Py_END_ALLOW_THREADS;
        if (!fine) PyErr_SetString(PyExc_ValueError, "packed: a place outside its row");
    }
    PyBuffer_Release(&packed);
    PyBuffer_Release(&table);
    PyBuffer_Release(&out);
    return finished(fine);
}

static PyMethodDef METHODS[] = {
    {"difference", py_difference, METH_VARARGS, NULL},
    {"weighted_sum", py_weighted_sum, METH_VARARGS, NULL},
    {"block_norms", py_block_norms, METH_VARARGS, NULL},
    {"task_vectors", py_task_vectors, METH_VARARGS, NULL},
    {"draw", py_draw, METH_VARARGS, NULL},
    {"count_digits", py_count_digits, METH_VARARGS, NULL},
    {"place_of", py_place_of, METH_VARARGS, NULL},
    {"all_finite", py_all_finite, METH_VARARGS, NULL},
    {"pack_places", py_pack_places, METH_VARARGS, NULL},
    {"unpack_places", py_unpack_places, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_loops", "Loops of soups.merging.kernels.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__loops(void) {
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "VERSION", VERSION) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
