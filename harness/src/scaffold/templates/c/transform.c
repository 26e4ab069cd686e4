/* The settings. */
typedef struct {
    uint32_t distance; /* tokens between an element and what it is subtracted from */
} transform;

static gearbox_status build(gearbox_str config, void **object, gearbox_error *error) {
    transform *made = malloc(sizeof *made);
    if (!made) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the transform");
    made->distance = setting(config, "\"distance\":", 1);
    *object = made;
    return GEARBOX_OK;
}

/* The settings with every default filled in. */
static gearbox_status config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    char text[64];
    int len = snprintf(text, sizeof text, "{\"distance\":%lu}", (unsigned long)((const transform *)object)->distance);
    if (json->append(json->state, (const uint8_t *)text, (size_t)len) != GEARBOX_OK)
        return fail(error, GEARBOX_OTHER, "the host takes no settings");
    return GEARBOX_OK;
}

/* What the transform takes, and what it needs of the context. Every claim is tested. */
static gearbox_status capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_FLOAT_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

/* Every bit comes back: the bits are subtracted as whole numbers, and those wrap around. */
static gearbox_status bound(const void *object, gearbox_bound *out, gearbox_error *error) {
    (void)object, (void)error;
    out->kind = GEARBOX_BOUND_LOSSLESS;
    out->value = 0;
    return GEARBOX_OK;
}

static size_t elem_size(uint32_t elem) { return elem == GEARBOX_F32 ? 4 : 2; }

/* The lane: whole numbers as wide as the elements. One that other transforms may follow would be called "tensor" and hold floats. */
static gearbox_lane_spec lane_of(uint32_t elem, size_t seq, size_t heads, size_t dim) {
    gearbox_lane_spec spec = {TEXT("deltas"), elem == GEARBOX_F32 ? GEARBOX_U32 : GEARBOX_U16, 0, 0, 0, 0};
    spec.seq = seq;
    spec.heads = heads;
    spec.dim = dim;
    return spec;
}

/* Elements are little-endian and need not be aligned. */
static uint32_t get(const uint8_t *data, size_t size) {
    uint32_t value = 0;
    for (size_t byte = size; byte-- > 0;) value = value << 8 | data[byte];
    return value;
}

static void put(uint8_t *data, size_t size, uint32_t value) {
    for (size_t byte = 0; byte < size; byte++, value >>= 8) data[byte] = (uint8_t)value;
}

static gearbox_status forward(const void *object, const gearbox_chunk *chunk, const gearbox_context *context, const gearbox_lane_sink *out,
                              gearbox_error *error) {
    (void)context;
    const gearbox_lane_spec spec = lane_of(chunk->elem, chunk->seq, chunk->heads, chunk->dim);
    size_t size = elem_size(chunk->elem), row = chunk->heads * chunk->dim * size, distance = ((const transform *)object)->distance;
    uint8_t *lane = out->lane(out->state, &spec);
    if (!lane) return fail(error, GEARBOX_LIMIT, "the host refuses the lane");
    for (size_t token = 0; token < chunk->seq; token++)
        for (size_t at = token * row; at < (token + 1) * row; at += size) {
            uint32_t before = token < distance ? 0 : get(chunk->data + at - distance * row, size);
            put(lane + at, size, get(chunk->data + at, size) - before);
        }
    return GEARBOX_OK;
}

/* Lanes may be damaged, missing or of other shapes. */
static gearbox_status inverse(const void *object, const gearbox_lane *lanes, size_t lane_count, const gearbox_context *context,
                              const gearbox_chunk_mut *out, gearbox_error *error) {
    (void)context;
    const gearbox_lane_spec expected = lane_of(out->elem, out->seq, out->heads, out->dim);
    if (lane_count != 1) return fail(error, GEARBOX_CORRUPT, "expected one lane");
    const gearbox_lane_spec *got = &lanes->spec;
    if (got->name.len != expected.name.len || memcmp(got->name.data, expected.name.data, expected.name.len) != 0 ||
        got->elem != expected.elem || got->seq != expected.seq || got->heads != expected.heads || got->dim != expected.dim)
        return fail(error, GEARBOX_CORRUPT, "expected the lane `deltas`, as wide as the elements and of the shape of the chunk");
    size_t size = elem_size(out->elem), row = out->heads * out->dim * size, distance = ((const transform *)object)->distance;
    for (size_t token = 0; token < out->seq; token++)
        for (size_t at = token * row; at < (token + 1) * row; at += size) {
            uint32_t before = token < distance ? 0 : get(out->data + at - distance * row, size);
            put(out->data + at, size, get(lanes->data + at, size) + before);
        }
    return GEARBOX_OK;
}

static const gearbox_transform functions = {
    .size = sizeof(gearbox_transform),
    .bound = bound,
    .forward = forward,
    .inverse = inverse,
};

static const gearbox_plugin plugin = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_TRANSFORM,
    .format_version = 1, /* raise it when lanes of earlier versions can no longer be read */
    .id = TEXT("@NAME@"),
    .summary = TEXT("difference of the bits to an earlier token, exact"),
    .source = TEXT("own work"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
                   "\"distance\":{\"type\":\"integer\",\"minimum\":1,\"maximum\":64,\"default\":1,"
                   "\"description\":\"How many tokens back lies what an element is subtracted from.\"}}}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .transform = &functions,
};

