/*
 * gearbox_plugin.h: the plugin ABI of Gearbox, version 1.0, for C11, C++ and whatever can call C.
 *
 * A plugin library is a shared library that exports one function:
 *
 *     const gearbox_library *gearbox_plugin_v1(const gearbox_host *host);
 *
 * It returns a list of plugins: codecs (lane to bytes and back, exact), transforms (tensor to lanes and back, within a bound) and eviction
 * policies (which tokens stay). The host copies nothing of the list: it must stay as it is until the process ends. Libraries are never
 * unloaded. `plugins/examples/c-demo` is a complete library.
 *
 * Rules
 *
 *  - Ownership: whoever calls owns every buffer and every struct that it passes, and they are valid until the call returns. A plugin keeps no
 *    pointer that it was given, except `host`, and frees nothing but its own objects and sessions.
 *  - Threads: the host may call from any thread, and call functions of one object from several threads at once, so objects do not change
 *    after `build`. A session is used by one thread at a time. Callbacks are called from the thread that the call came in on, before it
 *    returns; `gearbox_host.log` from any thread at any time.
 *  - Errors: a function that returns `gearbox_status` returns GEARBOX_OK, or another status after writing a text into `error`. Text of an
 *    error: lower case, no final period, expected and got. What it wrote elsewhere is then ignored.
 *  - Nothing may be thrown across: no C++ exception, no longjmp, no Rust panic.
 *  - Text is UTF-8 with a length, and is not terminated by a zero byte.
 *  - Elements and stored integers are little-endian, whatever the machine.
 *  - Pointers are not null unless the field says so. A pointer to no elements may be anything; look at the length first.
 *  - Structs that begin with `size` may grow at their end in later minor versions. Whoever fills one sets `size` to `sizeof` of it; whoever
 *    reads one reads no more than `size` bytes. Fields named `reserved` are zero. All other structs stay as they are.
 */
#ifndef GEARBOX_PLUGIN_H
#define GEARBOX_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this header. Libraries are loaded if the major version is the same; a newer minor version on either side is no obstacle. */
#define GEARBOX_ABI_MAJOR 1
#define GEARBOX_ABI_MINOR 0

/* Put before the definition of the entry point, so that it is exported whatever the compiler's flags are. */
#if defined(_WIN32)
#define GEARBOX_EXPORT __declspec(dllexport)
#elif defined(__GNUC__)
#define GEARBOX_EXPORT __attribute__((visibility("default")))
#else
#define GEARBOX_EXPORT
#endif

/* What a call came to. */
typedef int32_t gearbox_status;
#define GEARBOX_OK 0
#define GEARBOX_UNSUPPORTED 1       /* a legal request that the plugin does not serve */
#define GEARBOX_UNSUPPORTED_DTYPE 2 /* an element type that it does not take */
#define GEARBOX_INVALID_CONFIG 3    /* settings that pass the schema and still make no sense */
#define GEARBOX_INVALID_INPUT 4     /* an argument that breaks the rules: the host's fault */
#define GEARBOX_SHAPE_MISMATCH 5    /* lengths and shapes disagree */
#define GEARBOX_CORRUPT 6           /* encoded bytes or lanes that this plugin cannot have written */
#define GEARBOX_LIMIT 7             /* more memory or more bytes than allowed */
#define GEARBOX_MISMATCH 8          /* decoded data differs from what was encoded */
#define GEARBOX_IO 9                /* the operating system refused something */
#define GEARBOX_PANICKED 10         /* a fault of the plugin that it noticed itself */
#define GEARBOX_OUT_OF_MEMORY 11    /* no memory for what it has to do */
#define GEARBOX_WRONG_LENGTH 12     /* more bytes than it promised: a fault of the plugin that it noticed itself */
#define GEARBOX_OTHER 255           /* anything else */

/* Kinds of plugins. */
#define GEARBOX_CODEC 0
#define GEARBOX_TRANSFORM 1
#define GEARBOX_EVICTION 2

/* Element types. In gearbox_capabilities.elems, bit n stands for type n. */
#define GEARBOX_F16 0  /* IEEE 754 binary16 */
#define GEARBOX_BF16 1 /* bfloat16 */
#define GEARBOX_F32 2  /* IEEE 754 binary32 */
#define GEARBOX_U8 3
#define GEARBOX_U16 4
#define GEARBOX_U32 5
#define GEARBOX_BITS 6 /* unsigned, of 1 to 16 bits: one byte each up to 8 bits, two bytes each above */

/* All types in gearbox_capabilities.elems, and the three that tensors have. */
#define GEARBOX_ALL_ELEMS 0x7Fu
#define GEARBOX_FLOAT_ELEMS 0x07u

/* Whether a tensor holds keys or values. */
#define GEARBOX_KEY 0
#define GEARBOX_VALUE 1

/* Parts of the context: bits of gearbox_capabilities.needs and .wants. */
#define GEARBOX_NEEDS_TOKENS 1u
#define GEARBOX_NEEDS_ROPE 2u
#define GEARBOX_NEEDS_PEER 4u
#define GEARBOX_NEEDS_HISTORY 8u

/* Bits of gearbox_capabilities.flags. */
#define GEARBOX_DETERMINISTIC 1u /* same input, same bytes, on every machine */
#define GEARBOX_STREAMING 2u     /* tokens can be appended without coding earlier ones again */

/* Errors that a transform promises, per element. */
#define GEARBOX_BOUND_LOSSLESS 0  /* every bit comes back, NaN payloads included */
#define GEARBOX_BOUND_ABSOLUTE 1  /* |decoded - original| <= value */
#define GEARBOX_BOUND_RELATIVE 2  /* |decoded - original| <= value * |original| */
#define GEARBOX_BOUND_PEAK 3      /* |decoded - original| <= value * the largest finite |original| of the chunk */
#define GEARBOX_BOUND_UNBOUNDED 4 /* nothing is promised */

/* Keep sets of an eviction policy. */
#define GEARBOX_KEEP_ALL 0    /* all live tokens; the list is empty */
#define GEARBOX_KEEP_SHARED 1 /* one list for every KV head */
#define GEARBOX_KEEP_HEAD 2   /* the list of the next KV head: called once for each, from head 0 on; all lists are of one length */

/* Changes of RoPE frequencies for long contexts. */
#define GEARBOX_ROPE_NONE 0
#define GEARBOX_ROPE_LINEAR 1 /* every frequency divided by `factor` */
#define GEARBOX_ROPE_LLAMA3 2 /* low frequencies divided by `factor`, high ones kept, with a smooth step between */

/* Levels of a log. */
#define GEARBOX_ERROR 1
#define GEARBOX_WARN 2
#define GEARBOX_INFO 3
#define GEARBOX_DEBUG 4

/* Text in UTF-8; `data` may be null if `len` is 0. */
typedef struct gearbox_str {
    const char *data;
    size_t len; /* bytes */
} gearbox_str;

/* A buffer of the caller for the text of an error: write at most `capacity` bytes to `data`, and how many to `len`. */
typedef struct gearbox_error {
    char *data;
    size_t capacity; /* bytes */
    size_t len;      /* bytes; 0 when the call starts */
} gearbox_error;

/* Takes bytes of a length that only the plugin knows, in one or more pieces. */
typedef struct gearbox_sink {
    void *state; /* first argument of `append` */
    /* Copies `len` bytes. Anything but GEARBOX_OK means that the host takes no more: return an error then. */
    gearbox_status (*append)(void *state, const uint8_t *data, size_t len);
} gearbox_sink;

/* Name, element type and shape of a lane: one homogeneous array, row-major, in logical order (seq, heads, dim). */
typedef struct gearbox_lane_spec {
    gearbox_str name; /* unique in its chunk; an untransformed tensor is "tensor"; no '.', at most 255 bytes */
    uint32_t elem;    /* GEARBOX_F16 ... GEARBOX_BITS */
    uint32_t bits;    /* width of GEARBOX_BITS, 1 to 16; 0 for all others */
    size_t seq;       /* tokens; lanes without these axes are (elements, 1, 1) */
    size_t heads;     /* KV heads */
    size_t dim;       /* channels per head */
} gearbox_lane_spec;

/* A lane and its elements. */
typedef struct gearbox_lane {
    gearbox_lane_spec spec;
    const uint8_t *data; /* little-endian, not aligned */
    size_t len;          /* bytes: seq * heads * dim * bytes per element */
} gearbox_lane;

/* A run of tokens of one layer and role, row-major, (seq, heads, dim). */
typedef struct gearbox_chunk {
    size_t seq;
    size_t heads;
    size_t dim;
    uint32_t elem; /* GEARBOX_F16, GEARBOX_BF16 or GEARBOX_F32 */
    uint32_t reserved;
    const uint8_t *data; /* little-endian, not aligned */
    size_t len;          /* bytes */
} gearbox_chunk;

/* A run of tokens to fill, every byte of it. */
typedef struct gearbox_chunk_mut {
    size_t seq;
    size_t heads;
    size_t dim;
    uint32_t elem; /* GEARBOX_F16, GEARBOX_BF16 or GEARBOX_F32 */
    uint32_t reserved;
    uint8_t *data; /* little-endian, not aligned; the old contents mean nothing */
    size_t len;    /* bytes */
} gearbox_chunk_mut;

/* How a model rotates its keys and queries. */
typedef struct gearbox_rope {
    uint64_t size;
    uint32_t pairing;    /* 0: channels (2i, 2i + 1) turn together; 1: (i, i + rotary_dim / 2) */
    uint32_t scaling;    /* GEARBOX_ROPE_NONE, ... */
    double theta;        /* base of the frequencies, such as 10000 */
    uint64_t rotary_dim; /* channels that are rotated, counted from the first; even */
    double factor;       /* for GEARBOX_ROPE_LINEAR and GEARBOX_ROPE_LLAMA3 */
    double low_freq_factor;    /* GEARBOX_ROPE_LLAMA3: wavelengths above original_context / this are scaled in full */
    double high_freq_factor;   /* GEARBOX_ROPE_LLAMA3: wavelengths below original_context / this are kept */
    uint64_t original_context; /* GEARBOX_ROPE_LLAMA3: tokens that the model was trained on */
} gearbox_rope;

/* What encoder and decoder both know without paying for it. The host gives a decoder exactly what the encoder had. */
typedef struct gearbox_context {
    uint64_t size;
    uint32_t layer;             /* of the model, from 0 */
    uint32_t role;              /* GEARBOX_KEY or GEARBOX_VALUE */
    uint64_t first_token;       /* position of the chunk's first token */
    uint64_t end_token;         /* position behind the last token of the sequence; UINT64_MAX if unknown */
    const uint32_t *tokens;     /* token ids of this chunk, one per token; null if unknown */
    size_t token_count;
    const gearbox_rope *rope;   /* null if unknown */
    const gearbox_chunk *peer;  /* decoded keys of these tokens while their values are coded; null if there are none */
    const gearbox_chunk *history; /* decoded earlier tokens of this layer and role, by position, maybe with gaps; null if there are none */
    const uint32_t *history_tokens; /* token ids of the history; null unless all are known */
    size_t history_token_count;
} gearbox_context;

/* What an object declares; every claim is tested. The host sets `size`, the plugin all other fields. */
typedef struct gearbox_capabilities {
    uint64_t size;
    uint32_t elems; /* bit n: it takes elements of type n, in lanes (codec) or tensors (transform); no matter for eviction */
    uint32_t needs; /* GEARBOX_NEEDS_...: parts of the context without which the host does not call it */
    uint32_t wants; /* parts that help it; it works without them too */
    uint32_t flags; /* GEARBOX_DETERMINISTIC, GEARBOX_STREAMING */
} gearbox_capabilities;

/* The error that a transform promises. */
typedef struct gearbox_bound {
    uint64_t kind; /* GEARBOX_BOUND_... */
    double value;  /* for GEARBOX_BOUND_ABSOLUTE, _RELATIVE and _PEAK: finite, at least 0 */
} gearbox_bound;

/* Gives the lanes of a transformed chunk their memory. */
typedef struct gearbox_lane_sink {
    void *state; /* first argument of `lane` */
    /* Adds a lane of zeros and returns its bytes, to be filled before the plugin's call returns. Null if the host refuses it, such as a name
     * that is taken: return an error then; the host knows why. Lanes are stored in the order in which they are added. */
    uint8_t *(*lane)(void *state, const gearbox_lane_spec *spec);
} gearbox_lane_sink;

/* A lane that a codec may learn from. */
typedef struct gearbox_sample {
    gearbox_lane lane;
    uint32_t layer;
    uint32_t role; /* GEARBOX_KEY or GEARBOX_VALUE */
} gearbox_sample;

/* Lanes that a codec may learn from, one after the other. */
typedef struct gearbox_samples {
    void *state; /* first argument of `next` */
    /* Writes the next sample, which is valid until the next call, and returns 1; returns 0 at the end. */
    int32_t (*next)(void *state, gearbox_sample *sample);
} gearbox_samples;

/* Extent of the cache of one layer. */
typedef struct gearbox_geometry {
    uint64_t size;
    uint32_t layer;  /* of the model, from 0 */
    uint32_t layers; /* of the model */
    size_t q_heads;  /* query heads, a multiple of kv_heads */
    size_t kv_heads;
    size_t dim; /* channels per head */
} gearbox_geometry;

/* What attention did while one or more tokens were appended. `live` is (rows, tokens): one row while all KV heads hold the same tokens, else
 * one per KV head. Query head h reads KV head h / (q_heads / kv_heads). */
typedef struct gearbox_attention_step {
    uint64_t size;
    uint64_t first_query; /* position of the first query */
    size_t queries;
    size_t tokens;        /* live tokens of each head */
    const uint32_t *live; /* their positions, ascending in each row */
    size_t live_count;    /* rows * tokens */
    const float *probabilities; /* (queries, q_heads, tokens), row-major; 0 where masked */
    size_t probability_count;
} gearbox_attention_step;

/* The cache at the moment of a decision; `live` is (rows, tokens) as above. */
typedef struct gearbox_cache_view {
    uint64_t size;
    uint64_t seen;        /* tokens so far, evicted ones included */
    size_t tokens;        /* live tokens of each head */
    const uint32_t *live; /* their positions, ascending in each row */
    size_t live_count;    /* rows * tokens */
} gearbox_cache_view;

/* What a policy promises of every plan. */
typedef struct gearbox_retention {
    uint64_t most;   /* tokens that each head holds at most after a plan is applied; UINT64_MAX if there is no such number */
    uint64_t sinks;  /* so many first tokens stay, as far as they are live */
    uint64_t recent; /* so many last tokens stay */
} gearbox_retention;

/* Takes the tokens that stay. */
typedef struct gearbox_keep_sink {
    void *state; /* first argument of `keep` */
    /* Takes `count` indices into a row of gearbox_cache_view.live, ascending, none twice; see GEARBOX_KEEP_... for `mode`. Anything but
     * GEARBOX_OK means that the list is refused: return an error then. */
    gearbox_status (*keep)(void *state, uint32_t mode, const uint32_t *indices, size_t count);
} gearbox_keep_sink;

/* What the host offers; valid until the process ends. */
typedef struct gearbox_host {
    uint64_t size;
    uint32_t abi_major;
    uint32_t abi_minor;
    void *state; /* first argument of `log` */
    /* Takes a line of text without a line end, from any thread. `level`: GEARBOX_ERROR, ... */
    void (*log)(void *state, uint32_t level, gearbox_str text);
    uint64_t threads; /* threads that one call may use, its own included */
} gearbox_host;

/* Functions of a codec. It is exact: what is decoded equals what was encoded, bit for bit. */
typedef struct gearbox_codec {
    uint64_t size;
    /* The most bytes that `encode` writes for such a lane; at most 64 times the lane and 16 MiB. Must not overflow for huge shapes: saturate. */
    gearbox_status (*max_encoded_len)(const void *object, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error);
    /* Writes the encoded lane to `out`, which has room for `capacity` bytes, and how many it wrote to `len`. `capacity` is what
     * max_encoded_len answered. Only declared element types arrive, and every needed part of the context. */
    gearbox_status (*encode)(const void *object, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                             size_t *len, gearbox_error *error);
    /* Fills all `len` bytes of `out`, which is as long as the lane. `encoded` may be damaged in any way: return GEARBOX_CORRUPT if it shows,
     * and never read or write outside of the buffers. */
    gearbox_status (*decode)(const void *object, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                             const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error);
    /* Learns from samples, writes the learned model to `artifact` and 1 to `trained`; 0 if it learned nothing. Null if it never does. */
    gearbox_status (*train)(const void *object, const gearbox_samples *samples, const gearbox_sink *artifact, uint32_t *trained,
                            gearbox_error *error);
    /* Makes another object that uses a learned model, and writes it to `with`; null there if it takes none. Null if it never does. */
    gearbox_status (*with_artifact)(const void *object, const uint8_t *artifact, size_t len, void **with, gearbox_error *error);
} gearbox_codec;

/* Functions of a transform. In a chain, every transform but the last adds a lane "tensor" of the type and shape of its input. */
typedef struct gearbox_transform {
    uint64_t size;
    /* Writes the error that is promised. */
    gearbox_status (*bound)(const void *object, gearbox_bound *bound, gearbox_error *error);
    /* Adds the lanes of `chunk` to `out`. */
    gearbox_status (*forward)(const void *object, const gearbox_chunk *chunk, const gearbox_context *context, const gearbox_lane_sink *out,
                              gearbox_error *error);
    /* Fills `out` from the lanes. They may be damaged, missing or of other shapes: return GEARBOX_CORRUPT if it shows. */
    gearbox_status (*inverse)(const void *object, const gearbox_lane *lanes, size_t lane_count, const gearbox_context *context,
                              const gearbox_chunk_mut *out, gearbox_error *error);
    /* Writes, as JSON text, the settings as they act on one role with `dim` channels per head: where two settings do the same, both give one
     * text, and a sweep runs them once. Null if that is what `config` writes. */
    gearbox_status (*effective_config)(const void *object, uint32_t role, size_t dim, const gearbox_sink *json, gearbox_error *error);
    /* Adds other lanes for a chunk that `forward` turned into `lanes`, and writes 1 to `given`, if it is in doubt which take fewer bytes; 0 if
     * not. The smaller ones are stored. Null if it never has any. */
    gearbox_status (*alternative)(const void *object, const gearbox_chunk *chunk, const gearbox_lane *lanes, size_t lane_count,
                                  const gearbox_lane_sink *out, uint32_t *given, gearbox_error *error);
} gearbox_transform;

/* Functions of an eviction policy: settings live in the object, the state of one layer of one request in a session. */
typedef struct gearbox_eviction {
    uint64_t size;
    /* Starts a session and writes it to `session`. */
    gearbox_status (*session)(const void *object, const gearbox_geometry *geometry, void **session, gearbox_error *error);
    /* Takes in the attention of one step. */
    gearbox_status (*observe)(void *session, const gearbox_attention_step *step, gearbox_error *error);
    /* Decides which tokens stay: all, one list, or one list per KV head. */
    gearbox_status (*plan)(void *session, const gearbox_cache_view *cache, const gearbox_keep_sink *out, gearbox_error *error);
    /* Frees a session. Its object still exists. */
    void (*drop_session)(void *session);
    /* Writes what is promised of a plan when `seen` tokens were seen. Null if nothing is. */
    gearbox_status (*retention)(const void *object, const gearbox_geometry *geometry, uint64_t seen, gearbox_retention *retention,
                                gearbox_error *error);
} gearbox_eviction;

/* One plugin. */
typedef struct gearbox_plugin {
    uint64_t size;
    uint32_t kind;           /* GEARBOX_CODEC, GEARBOX_TRANSFORM or GEARBOX_EVICTION */
    uint32_t format_version; /* of the bytes it writes; raise it when older decoders cannot read them */
    gearbox_str id;          /* kebab-case: a-z, 0-9 and single '-'; names the method; never reused */
    gearbox_str summary;     /* one line for tables, without a period */
    gearbox_str source;      /* paper or repository that the method comes from, or "own work" */
    gearbox_str schema;      /* JSON Schema of the settings: an object, with "additionalProperties": false and a description of each */
    const gearbox_str *aliases; /* other spellings of the id; null if `alias_count` is 0 */
    size_t alias_count;
    /* Builds an object and writes it to `object`, never null. `config` is a JSON object that passed the schema, as compact text without
     * spaces between tokens; settings that are left out have their defaults. */
    gearbox_status (*build)(gearbox_str config, void **object, gearbox_error *error);
    /* Frees an object. No call uses it any more. */
    void (*drop)(void *object);
    /* Writes the settings as JSON text, with every default filled in. Building from that text gives the same object. */
    gearbox_status (*config)(const void *object, const gearbox_sink *json, gearbox_error *error);
    /* Writes what the object declares. Asked once, after `build`. */
    gearbox_status (*capabilities)(const void *object, gearbox_capabilities *out, gearbox_error *error);
    /* The table of its kind; the other two are null. */
    const gearbox_codec *codec;
    const gearbox_transform *transform;
    const gearbox_eviction *eviction;
} gearbox_plugin;

/* What the entry point returns. */
typedef struct gearbox_library {
    uint64_t size;
    uint32_t abi_major; /* GEARBOX_ABI_MAJOR */
    uint32_t abi_minor; /* GEARBOX_ABI_MINOR */
    const gearbox_plugin *const *plugins;
    size_t count;
} gearbox_library;

/* The entry point: defined by the plugin library, called once, and null if it cannot work on this machine. `host` may be kept. */
GEARBOX_EXPORT const gearbox_library *gearbox_plugin_v1(const gearbox_host *host);

#ifdef __cplusplus
}
#endif

#endif
