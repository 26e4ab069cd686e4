/*
 * A library that breaks rules, for the tests of the loader. What the list of plugins breaks is chosen when it is compiled:
 *
 *   -DMAJOR=2, -DSIZE=8, -DID='"..."', -DSCHEMA='"..."', -DSUMMARY='"..."', -DNO_ENCODE, -DNULL_LIBRARY, -DTWICE, -DKIND=7, -DENTRY=...
 *
 * What a call breaks is chosen by the setting `mode`.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gearbox_plugin.h"

#ifndef MAJOR
#define MAJOR GEARBOX_ABI_MAJOR
#endif
#ifndef SIZE
#define SIZE sizeof(gearbox_plugin)
#endif
#ifndef ID
#define ID "hostile"
#endif
#ifndef TRANSFORM_ID
#define TRANSFORM_ID "hostile-transform"
#endif
#ifndef SUMMARY
#define SUMMARY "for tests"
#endif
#ifndef SCHEMA
#define SCHEMA "{\"type\":\"object\",\"properties\":{\"mode\":{\"type\":\"string\",\"description\":\"what it breaks\"}}}"
#endif
#ifndef KIND
#define KIND GEARBOX_CODEC
#endif
#ifndef ENTRY
#define ENTRY gearbox_plugin_v1
#endif
#define TEXT_OF_ID ((const void *)ID) /* an address in this library */
#define TEXT(literal) {literal, sizeof(literal) - 1}

typedef struct {
    char mode[32];
} object;

static int is(const void *self, const char *mode) { return strcmp(((const object *)self)->mode, mode) == 0; }

static gearbox_status build(gearbox_str config, void **out, gearbox_error *error) {
    object *made = calloc(1, sizeof *made);
    const char *key = "\"mode\":\"";
    for (size_t at = 0; made && at + strlen(key) < config.len; at++)
        if (memcmp(config.data + at, key, strlen(key)) == 0) {
            const char *from = config.data + at + strlen(key), *to = memchr(from, '"', 31);
            if (to) memcpy(made->mode, from, (size_t)(to - from));
        }
    if (made && is(made, "null-object")) {
        free(made);
        return GEARBOX_OK;
    }
    if (made && is(made, "fail")) {
        free(made);
        memcpy(error->data, "expected another mode", error->len = 21);
        return GEARBOX_INVALID_CONFIG;
    }
    *out = made;
    return made ? GEARBOX_OK : GEARBOX_LIMIT;
}

static gearbox_status config(const void *self, const gearbox_sink *json, gearbox_error *error) {
    char text[48];
    (void)error;
    int len = is(self, "bad-json") ? snprintf(text, sizeof text, "{")
                                   : snprintf(text, sizeof text, "{\"mode\":\"%s\"}", ((const object *)self)->mode);
    return json->append(json->state, (const uint8_t *)text, (size_t)len);
}

static gearbox_status capabilities(const void *self, gearbox_capabilities *out, gearbox_error *error) {
    (void)error;
    out->elems = is(self, "no-elems") ? 0 : is(self, "unknown-elem") ? 0x80 : GEARBOX_ALL_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

#ifndef NO_ENCODE
/* Tries to unload this library, by more handles than anyone holds. */
static void unload(void) {
    Dl_info own;
    if (!dladdr(TEXT_OF_ID, &own)) return;
    void *handle = dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    for (int times = 0; handle && times < 8; times++) dlclose(handle);
}

static gearbox_status max_encoded_len(const void *self, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error) {
    (void)error;
    *len = is(self, "greedy") ? SIZE_MAX / 4 : lane->seq * lane->heads * lane->dim * 2;
    return GEARBOX_OK;
}

static gearbox_status encode(const void *self, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                             size_t *len, gearbox_error *error) {
    (void)context;
    memcpy(out, lane->data, lane->len);
    if (is(self, "overrun")) out[capacity] ^= 1;
    if (is(self, "silent")) return GEARBOX_CORRUPT;
    if (is(self, "unload")) unload();
    if (is(self, "unknown-status")) return 77;
    if (is(self, "bad-text")) {
        memcpy(error->data, "not \xFF text", error->len = 10);
        return GEARBOX_CORRUPT;
    }
    if (is(self, "long-text")) {
        error->len = SIZE_MAX;
        memset(error->data, 'x', error->capacity);
        return GEARBOX_CORRUPT;
    }
    *len = is(self, "long") ? capacity + 1 : lane->len;
    return GEARBOX_OK;
}

static gearbox_status decode(const void *self, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                             const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error) {
    (void)lane, (void)context, (void)error;
    if (encoded_len != len) return GEARBOX_CORRUPT;
    memcpy(out, encoded, len);
    if (is(self, "overrun-decode")) out[len] ^= 1;
    return GEARBOX_OK;
}
#endif

static const gearbox_codec codec = {
    .size = sizeof(gearbox_codec),
#ifndef NO_ENCODE
    .max_encoded_len = max_encoded_len,
    .encode = encode,
    .decode = decode,
#endif
};

static const gearbox_plugin hostile = {
    .size = SIZE,
    .kind = KIND,
    .format_version = 1,
    .id = TEXT(ID),
    .summary = TEXT(SUMMARY),
    .source = TEXT("own work"),
    .schema = TEXT(SCHEMA),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .codec = &codec,
};

/* A transform whose lanes break rules. */

static gearbox_status bound(const void *self, gearbox_bound *out, gearbox_error *error) {
    (void)error;
    out->kind = is(self, "bad-bound") ? 9 : GEARBOX_BOUND_LOSSLESS;
    out->value = 0;
    return GEARBOX_OK;
}

static gearbox_status forward(const void *self, const gearbox_chunk *chunk, const gearbox_context *context, const gearbox_lane_sink *out,
                              gearbox_error *error) {
    gearbox_lane_spec spec = {TEXT("tensor"), chunk->elem, 0, chunk->seq, chunk->heads, chunk->dim};
    (void)context, (void)error;
    if (is(self, "huge-lane")) spec.seq = SIZE_MAX;
    if (is(self, "odd-elem")) spec.elem = 9;
    uint8_t *lane = out->lane(out->state, &spec);
    if (!lane) return GEARBOX_LIMIT;
    memcpy(lane, chunk->data, chunk->len);
    if (is(self, "overrun")) lane[chunk->len] ^= 1;
    if (is(self, "two-lanes") && !out->lane(out->state, &spec)) return GEARBOX_LIMIT;
    return GEARBOX_OK;
}

static gearbox_status inverse(const void *self, const gearbox_lane *lanes, size_t lane_count, const gearbox_context *context,
                              const gearbox_chunk_mut *out, gearbox_error *error) {
    (void)context, (void)error;
    if (lane_count != 1 || lanes->len != out->len) return GEARBOX_CORRUPT;
    memcpy(out->data, lanes->data, out->len);
    if (is(self, "overrun-inverse")) out->data[out->len] ^= 1;
    return GEARBOX_OK;
}

static const gearbox_transform transform = {
    .size = sizeof(gearbox_transform),
    .bound = bound,
    .forward = forward,
    .inverse = inverse,
};

static const gearbox_plugin hostile_transform = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_TRANSFORM,
    .format_version = 1,
    .id = TEXT(TRANSFORM_ID),
    .summary = TEXT("for tests"),
    .source = TEXT("own work"),
    .schema = TEXT("{\"type\":\"object\"}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .transform = &transform,
};

/* A policy that keeps the first and the last token, whatever attention says. */

static gearbox_status session(const void *self, const gearbox_geometry *geometry, void **out, gearbox_error *error) {
    (void)error, (void)geometry;
    *out = is(self, "null-session") ? NULL : calloc(1, 1);
    return GEARBOX_OK;
}

static gearbox_status observe(void *self, const gearbox_attention_step *step, gearbox_error *error) {
    (void)self, (void)error;
    return step->probability_count ? GEARBOX_OK : GEARBOX_INVALID_INPUT;
}

static gearbox_status plan(void *self, const gearbox_cache_view *cache, const gearbox_keep_sink *out, gearbox_error *error) {
    const uint32_t kept[] = {0, (uint32_t)cache->tokens - 1};
    (void)self, (void)error;
    return out->keep(out->state, GEARBOX_KEEP_SHARED, kept, 2);
}

static const gearbox_eviction eviction = {sizeof(gearbox_eviction), session, observe, plan, free, NULL};

static const gearbox_plugin ends = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_EVICTION,
    .format_version = 1,
    .id = TEXT("ends"),
    .summary = TEXT("for tests"),
    .source = TEXT("own work"),
    .schema = TEXT("{\"type\":\"object\"}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .eviction = &eviction,
};

GEARBOX_EXPORT const gearbox_library *ENTRY(const gearbox_host *host) {
    static const gearbox_plugin *const plugins[] = {
        &hostile,
#ifdef TWICE
        &hostile,
#endif
        &hostile_transform,
        &ends,
    };
    static const gearbox_library library = {sizeof library, MAJOR, 9, plugins, sizeof plugins / sizeof *plugins};
    (void)host;
#ifdef NULL_LIBRARY
    return NULL;
#endif
    return &library;
}
