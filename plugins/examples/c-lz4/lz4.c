/*
 * The codec `system-lz4`: the LZ4 library of the system, as it ships in Debian's liblz4-dev, through the C ABI.
 *
 *     cc -std=c11 -O2 -shared -fPIC -I ../../abi/include lz4.c -llz4 -o liblz4-plugin.so
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <lz4.h>

#include "gearbox_plugin.h"

#define TEXT(literal) {literal, sizeof(literal) - 1}

/*
 * LZ4 counts in `int` and takes at most LZ4_MAX_INPUT_SIZE bytes, so a lane is cut into blocks; each comes behind its encoded length in four
 * bytes, low byte first. Blocks know nothing of each other.
 */
#define BLOCK ((size_t)1 << 30)
#define HEADER 4

typedef struct {
    int acceleration;
} codec;

static gearbox_status fail(gearbox_error *error, gearbox_status status, const char *text) {
    size_t len = strlen(text);
    error->len = len < error->capacity ? len : error->capacity;
    memcpy(error->data, text, error->len);
    return status;
}

static gearbox_status build(gearbox_str config, void **object, gearbox_error *error) {
    static const char key[] = "\"acceleration\":";
    codec *made = malloc(sizeof *made);
    if (!made) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the codec");
    made->acceleration = 1;
    /* The host checked the settings against the schema and writes no spaces, so that one number can be found without a JSON parser. */
    for (size_t at = 0; at + sizeof key - 1 <= config.len; at++) {
        if (memcmp(config.data + at, key, sizeof key - 1) != 0) continue;
        made->acceleration = 0;
        for (at += sizeof key - 1; at < config.len && config.data[at] >= '0' && config.data[at] <= '9'; at++)
            made->acceleration = made->acceleration * 10 + (config.data[at] - '0');
        break;
    }
    *object = made;
    return GEARBOX_OK;
}

static gearbox_status config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    char text[64];
    int len = snprintf(text, sizeof text, "{\"acceleration\":%d}", ((const codec *)object)->acceleration);
    if (json->append(json->state, (const uint8_t *)text, (size_t)len) != GEARBOX_OK)
        return fail(error, GEARBOX_OTHER, "the host takes no settings");
    return GEARBOX_OK;
}

static gearbox_status capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_ALL_ELEMS;
    out->needs = out->wants = 0;
    /* Encoded bytes depend on the version of the library and on the byte order of the machine. */
    out->flags = 0;
    return GEARBOX_OK;
}

static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

static size_t plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

static size_t elem_size(const gearbox_lane_spec *lane) {
    switch (lane->elem) {
    case GEARBOX_U8:
        return 1;
    case GEARBOX_BITS:
        return lane->bits <= 8 ? 1 : 2;
    case GEARBOX_F32:
    case GEARBOX_U32:
        return 4;
    default:
        return 2;
    }
}

static gearbox_status max_encoded_len(const void *object, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error) {
    (void)object, (void)error;
    size_t bytes = times(times(lane->seq, times(lane->heads, lane->dim)), elem_size(lane));
    /* LZ4_compressBound says `bytes + bytes / 255 + 16` for each block. */
    size_t blocks = bytes / BLOCK + 1;
    *len = plus(plus(bytes, bytes / 255), times(blocks, 16 + HEADER));
    return GEARBOX_OK;
}

static gearbox_status encode(const void *object, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                             size_t *len, gearbox_error *error) {
    (void)context;
    size_t written = 0;
    for (size_t at = 0; at < lane->len;) {
        size_t some = lane->len - at < BLOCK ? lane->len - at : BLOCK;
        if (capacity - written < HEADER) return fail(error, GEARBOX_WRONG_LENGTH, "expected a larger buffer");
        size_t room = capacity - written - HEADER;
        int got = LZ4_compress_fast((const char *)lane->data + at, (char *)out + written + HEADER, (int)some,
                                    room < INT_MAX ? (int)room : INT_MAX, ((const codec *)object)->acceleration);
        if (got <= 0) return fail(error, GEARBOX_PANICKED, "LZ4_compress_fast failed");
        for (int byte = 0; byte < HEADER; byte++) out[written++] = (uint8_t)((uint32_t)got >> 8 * byte);
        written += (size_t)got;
        at += some;
    }
    *len = written;
    return GEARBOX_OK;
}

static gearbox_status decode(const void *object, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                             const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error) {
    (void)object, (void)lane, (void)context;
    size_t read = 0;
    for (size_t at = 0; at < len;) {
        size_t some = len - at < BLOCK ? len - at : BLOCK, block = 0;
        if (encoded_len - read < HEADER) return fail(error, GEARBOX_CORRUPT, "expected the length of a block, got the end");
        for (int byte = 0; byte < HEADER; byte++) block |= (size_t)encoded[read++] << 8 * byte;
        if (block > encoded_len - read || block > INT_MAX) return fail(error, GEARBOX_CORRUPT, "expected more bytes, got the end within a block");
        /* LZ4_decompress_safe stays within both buffers, whatever the bytes say. */
        int got = LZ4_decompress_safe((const char *)encoded + read, (char *)out + at, (int)block, (int)some);
        if (got < 0 || (size_t)got != some) return fail(error, GEARBOX_CORRUPT, "expected an LZ4 block of the length of the lane");
        read += block;
        at += some;
    }
    return read == encoded_len ? GEARBOX_OK : fail(error, GEARBOX_CORRUPT, "expected the end, got more bytes");
}

static const gearbox_codec functions = {
    .size = sizeof(gearbox_codec),
    .max_encoded_len = max_encoded_len,
    .encode = encode,
    .decode = decode,
};

static const gearbox_plugin plugin = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_CODEC,
    .format_version = 1,
    .id = TEXT("system-lz4"),
    .summary = TEXT("the LZ4 library of the system"),
    .source = TEXT("https://github.com/lz4/lz4"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
                   "\"acceleration\":{\"type\":\"integer\",\"minimum\":1,\"maximum\":65537,\"default\":1,"
                   "\"description\":\"Higher is faster and larger: how quickly the search for matches gives up.\"}}}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .codec = &functions,
};

const gearbox_library *gearbox_plugin_v1(const gearbox_host *host) {
    static const gearbox_plugin *const plugins[] = {&plugin};
    static const gearbox_library library = {
        .size = sizeof(gearbox_library),
        .abi_major = GEARBOX_ABI_MAJOR,
        .abi_minor = GEARBOX_ABI_MINOR,
        .plugins = plugins,
        .count = sizeof plugins / sizeof *plugins,
    };
    if (host->log) {
        char line[64];
        int len = snprintf(line, sizeof line, "system-lz4 uses LZ4 %s", LZ4_versionString());
        gearbox_str text = {line, len > 0 && (size_t)len < sizeof line ? (size_t)len : 0};
        host->log(host->state, GEARBOX_DEBUG, text);
    }
    return &library;
}
