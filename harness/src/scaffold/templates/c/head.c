/*
 * @NAME@: @WHAT@
 *
 *     make                     builds lib@NAME@.so
 *     gearbox plugin check ./lib@NAME@.so
 *
 * gearbox_plugin.h says what each function has to do. The host calls functions of one object from several threads at once: objects do not
 * change after `build`. Everything but objects and sessions belongs to the host, and is valid until the call returns.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gearbox_plugin.h"

/* Text as the ABI has it: not terminated, with its length in bytes. */
#define TEXT(literal) {literal, sizeof(literal) - 1}

/* Writes an error text into the host's buffer, cut to its size. */
static gearbox_status fail(gearbox_error *error, gearbox_status status, const char *text) {
    size_t len = strlen(text);
    error->len = len < error->capacity ? len : error->capacity;
    memcpy(error->data, text, error->len);
    return status;
}

/*
 * Reads a whole number of the settings; `key` is written as `"name":`. The host has checked them against the schema and writes no spaces
 * between tokens, and there are no texts among them, so that this needs no JSON parser.
 */
static uint32_t setting(gearbox_str config, const char *key, uint32_t absent) {
    size_t len = strlen(key);
    for (size_t at = 0; at + len <= config.len; at++) {
        if (memcmp(config.data + at, key, len) != 0) continue;
        uint32_t value = 0;
        for (at += len; at < config.len && config.data[at] >= '0' && config.data[at] <= '9'; at++)
            value = value * 10 + (uint32_t)(config.data[at] - '0');
        return value;
    }
    return absent;
}

