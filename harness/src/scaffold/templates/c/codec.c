/* The settings. */
typedef struct {
    uint32_t distance; /* tokens between an element and what it is subtracted from; 0 to subtract nothing */
} codec;

static gearbox_status build(gearbox_str config, void **object, gearbox_error *error) {
    codec *made = malloc(sizeof *made);
    if (!made) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the codec");
    made->distance = setting(config, "\"distance\":", 1);
    *object = made;
    return GEARBOX_OK;
}

/* The settings with every default filled in. */
static gearbox_status config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    char text[64];
    int len = snprintf(text, sizeof text, "{\"distance\":%lu}", (unsigned long)((const codec *)object)->distance);
    if (json->append(json->state, (const uint8_t *)text, (size_t)len) != GEARBOX_OK)
        return fail(error, GEARBOX_OTHER, "the host takes no settings");
    return GEARBOX_OK;
}

/* What the codec takes, and what it needs of the context. Every claim is tested. */
static gearbox_status capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_ALL_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

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

/* Product that stays at SIZE_MAX when it is too large. */
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

/* A lone zero takes two bytes. */
static gearbox_status max_encoded_len(const void *object, const gearbox_lane_spec *lane, size_t *len, gearbox_error *error) {
    (void)object, (void)error;
    *len = times(2, times(times(lane->seq, times(lane->heads, lane->dim)), elem_size(lane)));
    return GEARBOX_OK;
}

/* Bytes between a byte and the one it is subtracted from. */
static size_t step_of(const void *object, const gearbox_lane_spec *lane) {
    return times(times(times(lane->heads, lane->dim), elem_size(lane)), ((const codec *)object)->distance);
}

/* The byte `step` before place `at`; 0 where nothing is subtracted. */
static uint8_t earlier(const uint8_t *bytes, size_t at, size_t step) { return step && at >= step ? bytes[at - step] : 0; }

/* Any byte but zero stands for itself; a zero is followed by a byte that says how many more follow. */
static gearbox_status encode(const void *object, const gearbox_lane *lane, const gearbox_context *context, uint8_t *out, size_t capacity,
                             size_t *len, gearbox_error *error) {
    (void)context;
    size_t step = step_of(object, &lane->spec), written = 0, at = 0;
    while (at < lane->len) {
        uint8_t difference = (uint8_t)(lane->data[at] - earlier(lane->data, at, step));
        if (capacity - written < (difference ? 1u : 2u)) return fail(error, GEARBOX_WRONG_LENGTH, "expected a larger buffer");
        out[written++] = difference;
        at++;
        if (difference != 0) continue;
        uint8_t more = 0;
        while (at < lane->len && more < 255 && lane->data[at] == earlier(lane->data, at, step)) more++, at++;
        out[written++] = more;
    }
    *len = written;
    return GEARBOX_OK;
}

/* `encoded` may be damaged in any way: every length in it is checked before it is used. */
static gearbox_status decode(const void *object, const uint8_t *encoded, size_t encoded_len, const gearbox_lane_spec *lane,
                             const gearbox_context *context, uint8_t *out, size_t len, gearbox_error *error) {
    (void)context;
    size_t step = step_of(object, lane), at = 0, read = 0;
    while (read < encoded_len) {
        uint8_t difference = encoded[read++];
        size_t run = 1;
        if (difference == 0) {
            if (read == encoded_len) return fail(error, GEARBOX_CORRUPT, "expected the length of a run, got the end");
            run += encoded[read++];
        }
        if (run > len - at) return fail(error, GEARBOX_CORRUPT, "expected fewer bytes, got a run behind the end of the lane");
        for (; run > 0; run--, at++) out[at] = (uint8_t)(difference + earlier(out, at, step));
    }
    return at == len ? GEARBOX_OK : fail(error, GEARBOX_CORRUPT, "expected more bytes, got the end before the lane is full");
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
    .format_version = 1, /* raise it when bytes of earlier versions can no longer be read */
    .id = TEXT("@NAME@"),
    .summary = TEXT("difference to an earlier token, runs of zeros"),
    .source = TEXT("own work"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
                   "\"distance\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":64,\"default\":1,"
                   "\"description\":\"How many tokens back lies what an element is subtracted from; 0 to subtract nothing.\"}}}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .codec = &functions,
};

