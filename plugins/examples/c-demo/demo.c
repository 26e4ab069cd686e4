/*
 * Third-party plugins in C: the codec `plane-runs` and the transform `channel-major`, in one file.
 *
 *     cc -std=c11 -O2 -shared -fPIC -I ../../abi/include demo.c -o libdemo.so
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "gearbox_plugin.h"

#define TEXT(literal) {literal, sizeof(literal) - 1}

/* Writes an error text, cut to the caller's buffer. */
static gearbox_status fail(gearbox_error *error, gearbox_status status, const char *text) {
    size_t len = strlen(text);
    error->len = len < error->capacity ? len : error->capacity;
    memcpy(error->data, text, error->len);
    return status;
}

static gearbox_status put(const gearbox_sink *sink, const char *text) {
    return sink->append(sink->state, (const uint8_t *)text, strlen(text));
}

static size_t elem_size(uint32_t elem, uint32_t bits) {
    switch (elem) {
    case GEARBOX_U8:
        return 1;
    case GEARBOX_BITS:
        return bits <= 8 ? 1 : 2;
    case GEARBOX_F32:
    case GEARBOX_U32:
        return 4;
    default:
        return 2;
    }
}

/*
 * plane-runs: the first bytes of all elements, then the second bytes, and so on; each plane as runs. A run is a byte of 0 to 127 and one to
 * 128 bytes as they are, or a byte of 128 to 255 and one byte that stands 2 to 129 times.
 */

typedef struct {
    bool planes;
} runs;

static gearbox_status runs_build(gearbox_str config, void **object, gearbox_error *error) {
    static const char off[] = "\"planes\":false";
    runs *made = malloc(sizeof *made);
    if (!made) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the codec");
    /* The host checked the settings against the schema and writes no spaces, so that one setting can be found without a JSON parser. */
    made->planes = true;
    for (size_t at = 0; at + sizeof off - 1 <= config.len; at++)
        if (memcmp(config.data + at, off, sizeof off - 1) == 0) made->planes = false;
    *object = made;
    return GEARBOX_OK;
}

static gearbox_status runs_config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    (void)error;
    return put(json, ((const runs *)object)->planes ? "{\"planes\":true}" : "{\"planes\":false}");
}

static gearbox_status runs_capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_ALL_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

/* Product that stays at SIZE_MAX when it is too large. */
static size_t saturating(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

static gearbox_status runs_max(const void *object, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error) {
    (void)object, (void)error;
    size_t bytes = saturating(saturating(lane->seq, saturating(lane->heads, lane->dim)), elem_size(lane->elem, lane->bits));
    /* One byte of control for 128 bytes as they are, and one more where the data ends. */
    *len = bytes > SIZE_MAX - bytes / 128 - 1 ? SIZE_MAX : bytes + bytes / 128 + 1;
    return GEARBOX_OK;
}

/* Place of the n-th byte in the order of the planes. */
static size_t place(size_t n, size_t count, size_t size) { return n % count * size + n / count; }

static gearbox_status runs_encode(const void *object, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                                  size_t *len, gearbox_error *error) {
    (void)context;
    size_t size = ((const runs *)object)->planes ? elem_size(lane->spec.elem, lane->spec.bits) : 1;
    size_t total = lane->len, count = total / size, written = 0, start = 0, n = 0;
#define AT(n) lane->data[place(n, count, size)]
    /* `start` is the first byte that is not written yet, `n` where the next run is looked for. A run of three pays for breaking literals. */
    while (start < total) {
        size_t run = 1;
        while (n < total && n + run < total && run < 129 && AT(n + run) == AT(n)) run++;
        bool is_run = n < total && run >= 3;
        if (!is_run && n < total) n += run;
        size_t literals = n - start;
        while (literals && (is_run || n >= total || literals >= 128)) {
            size_t some = literals < 128 ? literals : 128;
            if (capacity - written < some + 1) return fail(error, GEARBOX_WRONG_LENGTH, "expected a larger buffer");
            out[written++] = (uint8_t)(some - 1);
            for (size_t end = start + some; start < end; start++) out[written++] = AT(start);
            literals -= some;
        }
        if (is_run) {
            if (capacity - written < 2) return fail(error, GEARBOX_WRONG_LENGTH, "expected a larger buffer");
            out[written++] = (uint8_t)(126 + run);
            out[written++] = AT(n);
            start = n += run;
        }
    }
#undef AT
    *len = written;
    return GEARBOX_OK;
}

static gearbox_status runs_decode(const void *object, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                                  const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error) {
    (void)context;
    size_t size = ((const runs *)object)->planes ? elem_size(lane->elem, lane->bits) : 1;
    size_t count = len / size, n = 0, at = 0;
    while (at < encoded_len) {
        uint8_t control = encoded[at++];
        size_t run = control < 128 ? control + 1u : control - 126u;
        size_t taken = control < 128 ? run : 1;
        if (run > len - n) return fail(error, GEARBOX_CORRUPT, "expected fewer bytes, got a run behind the end of the lane");
        if (taken > encoded_len - at) return fail(error, GEARBOX_CORRUPT, "expected more bytes, got the end within a run");
        for (size_t i = 0; i < run; i++) out[place(n++, count, size)] = encoded[control < 128 ? at + i : at];
        at += taken;
    }
    return n == len ? GEARBOX_OK : fail(error, GEARBOX_CORRUPT, "expected more bytes, got the end before the lane is full");
}

static const gearbox_codec runs_codec = {
    .size = sizeof(gearbox_codec),
    .max_encoded_len = runs_max,
    .encode = runs_encode,
    .decode = runs_decode,
};

static const gearbox_plugin runs_plugin = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_CODEC,
    .format_version = 1,
    .id = TEXT("plane-runs"),
    .summary = TEXT("byte planes of the elements, run-length coded"),
    .source = TEXT("own work, to show how a plugin is written"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{\"planes\":{\"type\":\"boolean\",\"default\":true,"
                   "\"description\":\"Whether bytes are sorted by their place in the element first.\"}}}"),
    .build = runs_build,
    .drop = free,
    .config = runs_config,
    .capabilities = runs_capabilities,
    .codec = &runs_codec,
};

/* channel-major: the tensor with tokens fastest, so that equal channels of neighbouring tokens lie side by side. Exact. It has no settings. */

static gearbox_status major_build(gearbox_str config, void **object, gearbox_error *error) {
    static int no_settings;
    (void)config, (void)error;
    *object = &no_settings;
    return GEARBOX_OK;
}

static void major_drop(void *object) { (void)object; }

static gearbox_status major_config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    (void)object, (void)error;
    return put(json, "{}");
}

static gearbox_status major_capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_FLOAT_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

static gearbox_status major_bound(const void *object, gearbox_bound *bound, gearbox_error *error) {
    (void)object, (void)error;
    bound->kind = GEARBOX_BOUND_LOSSLESS;
    bound->value = 0;
    return GEARBOX_OK;
}

static gearbox_status major_forward(const void *object, const gearbox_chunk *chunk, const gearbox_context *context,
                                    const gearbox_lane_sink *out, gearbox_error *error) {
    (void)object, (void)context;
    const gearbox_lane_spec spec = {TEXT("channels"), chunk->elem, 0, chunk->heads, chunk->dim, chunk->seq};
    size_t size = elem_size(chunk->elem, 0), row = chunk->heads * chunk->dim;
    uint8_t *lane = out->lane(out->state, &spec);
    if (!lane) return fail(error, GEARBOX_LIMIT, "the host refuses the lane");
    for (size_t token = 0; token < chunk->seq; token++)
        for (size_t channel = 0; channel < row; channel++)
            memcpy(lane + (channel * chunk->seq + token) * size, chunk->data + (token * row + channel) * size, size);
    return GEARBOX_OK;
}

static gearbox_status major_inverse(const void *object, const gearbox_lane *lanes, size_t lane_count, const gearbox_context *context,
                                    const gearbox_chunk_mut *out, gearbox_error *error) {
    (void)object, (void)context;
    const gearbox_lane_spec *spec = &lanes->spec;
    if (lane_count != 1 || spec->name.len != 8 || memcmp(spec->name.data, "channels", 8) != 0 || spec->elem != out->elem ||
        spec->seq != out->heads || spec->heads != out->dim || spec->dim != out->seq)
        return fail(error, GEARBOX_CORRUPT, "expected only the lane `channels`, of the type and extents of the chunk");
    size_t size = elem_size(out->elem, 0), row = out->heads * out->dim;
    for (size_t token = 0; token < out->seq; token++)
        for (size_t channel = 0; channel < row; channel++)
            memcpy(out->data + (token * row + channel) * size, lanes->data + (channel * out->seq + token) * size, size);
    return GEARBOX_OK;
}

static const gearbox_transform major_transform = {
    .size = sizeof(gearbox_transform),
    .bound = major_bound,
    .forward = major_forward,
    .inverse = major_inverse,
};

static const gearbox_plugin major_plugin = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_TRANSFORM,
    .format_version = 1,
    .id = TEXT("channel-major"),
    .summary = TEXT("the tensor with tokens fastest, exact"),
    .source = TEXT("own work, to show how a plugin is written"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false}"),
    .build = major_build,
    .drop = major_drop,
    .config = major_config,
    .capabilities = major_capabilities,
    .transform = &major_transform,
};

const gearbox_library *gearbox_plugin_v1(const gearbox_host *host) {
    static const gearbox_plugin *const plugins[] = {&runs_plugin, &major_plugin};
    static const gearbox_library library = {
        .size = sizeof(gearbox_library),
        .abi_major = GEARBOX_ABI_MAJOR,
        .abi_minor = GEARBOX_ABI_MINOR,
        .plugins = plugins,
        .count = sizeof plugins / sizeof *plugins,
    };
    if (host->log) {
        gearbox_str line = TEXT("c-demo is loaded");
        host->log(host->state, GEARBOX_DEBUG, line);
    }
    return &library;
}
