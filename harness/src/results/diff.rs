//! Two stores side by side: which rows only one of them has, and which have other numbers.

use std::collections::BTreeSet;

use gearbox_core::{Result, config};
use serde::Serialize;
use serde_json::Value;

use super::Store;

/// How two stores differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Rows that both have, with equal facts.
    pub equal: usize,
    /// Keys that only the first has.
    pub only_first: Vec<String>,
    /// Keys that only the second has.
    pub only_second: Vec<String>,
    /// Rows that both have, with other facts.
    pub differing: Vec<Differing>,
}

/// A row with two sets of facts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Differing {
    /// Its key.
    pub key: String,
    /// Pipeline, chunking and dump.
    pub name: String,
    /// The first of the facts that differ.
    pub fields: Vec<Field>,
    /// How many more there are.
    pub more: usize,
}

/// One fact that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Field {
    /// JSON pointer into the row.
    pub pointer: String,
    /// The first value; none if it is not there.
    pub first: Option<Value>,
    /// The second value.
    pub second: Option<Value>,
}

impl Diff {
    /// Whether both hold the same.
    pub fn is_empty(&self) -> bool {
        self.only_first.is_empty() && self.only_second.is_empty() && self.differing.is_empty()
    }
}

/// Most facts that are listed of a row.
const FIELDS: usize = 8;

/// Compares two stores by key. Times, names of dumps and dates do not count.
///
/// # Errors
/// What reading them reports.
pub fn diff(first: &Store, second: &Store) -> Result<Diff> {
    let keys = |store: &Store| Ok(store.keys()?.into_iter().collect::<BTreeSet<_>>());
    let (of_first, of_second) = (keys(first)?, keys(second)?);
    let only = |own: &BTreeSet<String>, other: &BTreeSet<String>| own.difference(other).cloned().collect();
    let mut found =
        Diff { only_first: only(&of_first, &of_second), only_second: only(&of_second, &of_first), ..Diff::default() };
    for key in of_first.intersection(&of_second) {
        if first.digest_of(key)? == second.digest_of(key)? {
            found.equal += 1;
            continue;
        }
        let (first, second) = (first.record(key)?, second.record(key)?);
        let name = format!("{} {} over {}", first.row.name, first.row.chunking, first.row.dump);
        let (fields, more) = fields(&first.facts(), &second.facts());
        found.differing.push(Differing { key: key.clone(), name, fields, more });
    }
    Ok(found)
}

/// The first facts that differ, and how many more do. Of two rows that ended differently only that counts, as nothing of one compares with
/// the other.
pub(super) fn fields(first: &Value, second: &Value) -> (Vec<Field>, usize) {
    let mut all = Vec::new();
    collect("/state", first.get("state"), second.get("state"), &mut all);
    if all.is_empty() {
        collect("", Some(first), Some(second), &mut all);
    }
    let more = all.len().saturating_sub(FIELDS);
    all.truncate(FIELDS);
    (all, more)
}

fn collect(pointer: &str, first: Option<&Value>, second: Option<&Value>, all: &mut Vec<Field>) {
    match (first, second) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            for key in keys {
                collect(&config::join(pointer, key), a.get(key), b.get(key), all);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for idx in 0..a.len().max(b.len()) {
                collect(&format!("{pointer}/{idx}"), a.get(idx), b.get(idx), all);
            }
        }
        (first, second) if first != second => {
            all.push(Field { pointer: pointer.to_owned(), first: first.cloned(), second: second.cloned() });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_are_named_by_pointer() {
        let (a, b) = (json!({ "a": [1, { "x": 2 }], "same": 1 }), json!({ "a": [1, { "x": 3 }, 4], "same": 1 }));
        let (found, more) = fields(&a, &b);
        let named: Vec<_> = found.iter().map(|field| (field.pointer.as_str(), &field.first, &field.second)).collect();
        assert_eq!(named, [("/a/1/x", &Some(json!(2)), &Some(json!(3))), ("/a/2", &None, &Some(json!(4)))]);
        assert_eq!(more, 0);
        let ended = |state: &str| json!({ "state": state, "ratio": state.len() });
        let (found, more) = fields(&ended("ok"), &ended("error"));
        assert_eq!((found[0].pointer.as_str(), found.len(), more), ("/state", 1, 0));
        let many = |number: i32| json!((0..20).map(|idx| idx + number).collect::<Vec<_>>());
        let (found, more) = fields(&many(0), &many(1));
        assert_eq!((found.len(), more), (8, 12));
    }
}
