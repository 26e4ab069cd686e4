//! What a container holds, for programs.

use gearbox_core::container::{Container, Damage, ReadAt};
use serde_json::{Value, json};

/// What a container holds as JSON: pipeline, plugins, sequences, and every stored byte by account.
pub fn describe<S: ReadAt>(container: &Container<S>, damage: &[Damage]) -> Value {
    let header = container.header();
    let sequences: Vec<_> = container
        .sequences()
        .map(|sequence| {
            let info = &sequence.info;
            json!({
                "run": container.run(info.run).map(|run| run.name.clone()).unwrap_or_default(),
                "layer": info.layer, "role": info.role, "dtype": info.dtype, "heads": info.heads, "dim": info.dim,
                "entries": info.entries.len(), "tokens": info.seq(), "chunks": sequence.chunks.len(),
                "missing_tokens": sequence.missing,
                "digest": sequence.digest.map(|digest| format!("{digest:032x}")),
            })
        })
        .collect();
    let ledger: Vec<_> = container
        .ledger()
        .rows()
        .map(|(account, bytes)| json!({
            "section": account.section, "layer": account.layer, "role": account.role, "lane": account.lane, "bytes": bytes
        }))
        .collect();
    let damage: Vec<_> = damage
        .iter()
        .map(|damage| json!({ "start": damage.range.start, "end": damage.range.end, "message": damage.message }))
        .collect();
    json!({
        "writer": header.writer, "plugins": header.plugins, "pipeline": header.pipeline, "file_bytes": container.file_bytes(),
        "sequences": sequences, "ledger": ledger, "damage": damage,
    })
}
