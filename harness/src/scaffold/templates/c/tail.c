/* The one exported function. More plugins of any kind may stand in the list. */
const gearbox_library *gearbox_plugin_v1(const gearbox_host *host) {
    static const gearbox_plugin *const plugins[] = {&plugin};
    static const gearbox_library library = {
        .size = sizeof(gearbox_library),
        .abi_major = GEARBOX_ABI_MAJOR,
        .abi_minor = GEARBOX_ABI_MINOR,
        .plugins = plugins,
        .count = sizeof plugins / sizeof *plugins,
    };
    (void)host;
    return &library;
}
