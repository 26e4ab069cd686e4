//! What the registry accepts, finds and refuses.

mod common;

use std::sync::Arc;

use common::{Runs, registry};
use gearbox_core::{AnyEntry, Entry, ErrorKind, Kind, Registry};

#[test]
fn duplicate_ids_and_aliases_name_both_origins() {
    let mut registry = registry();
    let mut again: Entry<dyn gearbox_core::Codec> = Entry::of::<Runs>("/opt/libother.so", |plugin| Arc::new(plugin));
    let error = registry.insert(AnyEntry::Codec(again.clone())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DuplicatePlugin);
    assert_eq!(error.to_string(), "plugin id `runs` is claimed by both tests and /opt/libother.so");
    again.id = "other".into();
    let error = registry.insert(AnyEntry::Codec(again.clone())).unwrap_err();
    assert_eq!(error.to_string(), "plugin id `run_length` is claimed by both tests and /opt/libother.so");
    again.aliases = vec!["negative".into()];
    assert!(registry.insert(AnyEntry::Codec(again)).is_err(), "ids are unique over all kinds");
}

#[test]
fn ids_are_sorted_and_found_by_alias() {
    let registry = registry();
    let ids: Vec<_> = registry.entries().map(AnyEntry::id).collect();
    assert_eq!(ids, ["learned", "negative", "nibbles", "runs"]);
    assert_eq!(registry.codec("run_length").unwrap().id, "runs");
    assert_eq!(registry.get("nibbles").unwrap().kind(), Kind::Transform);
}

#[test]
fn unknown_ids_answer_with_near_ones_or_all() {
    let registry = registry();
    let error = registry.get("learnt").unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::UnknownPlugin, "no plugin has the id `learnt`, did you mean `learned`?",)
    );
    let error = registry.codec("xyz").unwrap_err();
    assert_eq!(error.to_string(), "no codec has the id `xyz`, known are `learned`, `runs`");
    assert_eq!(
        Registry::empty().codec("x").unwrap_err().to_string(),
        "no codec has the id `x`, no codec is registered"
    );
}
