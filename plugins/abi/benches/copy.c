/* A codec that copies, for the benchmark of what the boundary costs. */
#include <string.h>

#include "gearbox_plugin.h"

static gearbox_status build(gearbox_str config, void **object, gearbox_error *error) {
    static int nothing;
    (void)config, (void)error;
    *object = &nothing;
    return GEARBOX_OK;
}

static void drop(void *object) { (void)object; }

static gearbox_status config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    (void)object, (void)error;
    return json->append(json->state, (const uint8_t *)"{}", 2);
}

static gearbox_status capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_ALL_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

static gearbox_status max_encoded_len(const void *object, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error) {
    (void)object, (void)error;
    *len = lane->seq * lane->heads * lane->dim * 2;
    return GEARBOX_OK;
}

static gearbox_status encode(const void *object, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                             size_t *len, gearbox_error *error) {
    (void)object, (void)context, (void)error;
    if (lane->len > capacity) return GEARBOX_LIMIT;
    memcpy(out, lane->data, lane->len);
    *len = lane->len;
    return GEARBOX_OK;
}

static gearbox_status decode(const void *object, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                             const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error) {
    (void)object, (void)lane, (void)context, (void)error;
    if (encoded_len != len) return GEARBOX_CORRUPT;
    memcpy(out, encoded, len);
    return GEARBOX_OK;
}

const gearbox_library *gearbox_plugin_v1(const gearbox_host *host) {
    static const gearbox_codec codec = {sizeof codec, max_encoded_len, encode, decode, NULL, NULL};
    static const gearbox_plugin plugin = {
        .size = sizeof plugin,
        .kind = GEARBOX_CODEC,
        .format_version = 1,
        .id = {"copy", 4},
        .summary = {"a copy", 6},
        .source = {"own work", 8},
        .schema = {"{\"type\":\"object\",\"additionalProperties\":false}", 46},
        .build = build,
        .drop = drop,
        .config = config,
        .capabilities = capabilities,
        .codec = &codec,
    };
    static const gearbox_plugin *const plugins[] = {&plugin};
    static const gearbox_library library = {sizeof library, GEARBOX_ABI_MAJOR, GEARBOX_ABI_MINOR, plugins, 1};
    (void)host;
    return &library;
}
