/* The settings. */
typedef struct {
    uint32_t sinks;  /* first tokens of the sequence that stay */
    uint32_t recent; /* last tokens that stay */
} policy;

static gearbox_status build(gearbox_str config, void **object, gearbox_error *error) {
    policy *made = malloc(sizeof *made);
    if (!made) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the policy");
    made->sinks = setting(config, "\"sinks\":", 4);
    made->recent = setting(config, "\"recent\":", 128);
    *object = made;
    return GEARBOX_OK;
}

/* The settings with every default filled in. */
static gearbox_status config(const void *object, const gearbox_sink *json, gearbox_error *error) {
    const policy *settings = object;
    char text[64];
    int len = snprintf(text, sizeof text, "{\"sinks\":%lu,\"recent\":%lu}", (unsigned long)settings->sinks, (unsigned long)settings->recent);
    if (json->append(json->state, (const uint8_t *)text, (size_t)len) != GEARBOX_OK)
        return fail(error, GEARBOX_OTHER, "the host takes no settings");
    return GEARBOX_OK;
}

static gearbox_status capabilities(const void *object, gearbox_capabilities *out, gearbox_error *error) {
    (void)object, (void)error;
    out->elems = GEARBOX_FLOAT_ELEMS;
    out->needs = out->wants = 0;
    out->flags = GEARBOX_DETERMINISTIC;
    return GEARBOX_OK;
}

/* One layer of one request. What a policy learns from attention belongs here; one thread at a time uses it. */
typedef struct {
    policy settings;
} session;

static gearbox_status start(const void *object, const gearbox_geometry *geometry, void **made, gearbox_error *error) {
    (void)geometry;
    session *new = malloc(sizeof *new);
    if (!new) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the session");
    new->settings = *(const policy *)object;
    *made = new;
    return GEARBOX_OK;
}

/* Takes in true attention probabilities, (queries, q_heads, tokens). This policy needs none. */
static gearbox_status observe(void *state, const gearbox_attention_step *step, gearbox_error *error) {
    (void)state, (void)step, (void)error;
    return GEARBOX_OK;
}

/* `live` holds positions; a keep set holds indices into it, ascending. One row serves all heads, as all keep the same tokens. */
static gearbox_status plan(void *state, const gearbox_cache_view *cache, const gearbox_keep_sink *out, gearbox_error *error) {
    const policy *settings = &((const session *)state)->settings;
    uint64_t oldest = cache->seen > settings->recent ? cache->seen - settings->recent : 0;
    uint32_t *indices = malloc((cache->tokens + 1) * sizeof *indices);
    if (!indices) return fail(error, GEARBOX_OUT_OF_MEMORY, "no memory for the tokens that stay");
    size_t count = 0;
    for (size_t idx = 0; idx < cache->tokens; idx++)
        if (cache->live[idx] < settings->sinks || cache->live[idx] >= oldest) indices[count++] = (uint32_t)idx;
    gearbox_status status = count == cache->tokens ? out->keep(out->state, GEARBOX_KEEP_ALL, NULL, 0)
                                                       : out->keep(out->state, GEARBOX_KEEP_SHARED, indices, count);
    free(indices);
    return status == GEARBOX_OK ? GEARBOX_OK : fail(error, GEARBOX_OTHER, "the host refuses the keep set");
}

/* What `gearbox plugin check` holds every plan to. */
static gearbox_status retention(const void *object, const gearbox_geometry *geometry, uint64_t seen, gearbox_retention *out,
                                gearbox_error *error) {
    const policy *settings = object;
    (void)geometry, (void)seen, (void)error;
    out->sinks = settings->sinks;
    out->recent = settings->recent;
    out->most = out->sinks + out->recent;
    return GEARBOX_OK;
}

static const gearbox_eviction functions = {
    .size = sizeof(gearbox_eviction),
    .session = start,
    .observe = observe,
    .plan = plan,
    .drop_session = free,
    .retention = retention,
};

static const gearbox_plugin plugin = {
    .size = sizeof(gearbox_plugin),
    .kind = GEARBOX_EVICTION,
    .format_version = 1, /* raise it when the same settings decide differently */
    .id = TEXT("@NAME@"),
    .summary = TEXT("first tokens and last tokens stay"),
    .source = TEXT("Xiao et al., StreamingLLM, 2023"),
    .schema = TEXT("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
                   "\"sinks\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":65536,\"default\":4,"
                   "\"description\":\"First tokens of the sequence that stay, whatever happens: attention leans on them.\"},"
                   "\"recent\":{\"type\":\"integer\",\"minimum\":1,\"maximum\":1048576,\"default\":128,"
                   "\"description\":\"Last tokens that stay.\"}}}"),
    .build = build,
    .drop = free,
    .config = config,
    .capabilities = capabilities,
    .eviction = &functions,
};

