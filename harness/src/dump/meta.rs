//! Meta files of the reference layout as JSON objects whose keys keep their order.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A JSON object in the order of the file.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta(Vec<(String, Value)>);

impl Meta {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Replaces the value in its place, or appends it.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }

    /// Two-space indent, one key per line, non-ASCII as it is, no trailing newline.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_else(|_| unreachable!("keys are strings and a `Vec` takes all bytes"))
    }

    /// Whether both hold the same values, in whatever order.
    pub fn agrees(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().all(|(key, value)| other.get(key) == Some(value))
    }
}

impl Serialize for Meta {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Meta {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Meta;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Meta, A::Error> {
                let mut meta = Meta::default();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    // A hostile file may hold millions of keys; the reference writes seventeen.
                    if meta.0.len() == MOST_KEYS {
                        return Err(serde::de::Error::custom(format_args!("more than {MOST_KEYS} keys")));
                    }
                    meta.set(&key, value);
                }
                Ok(meta)
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

/// Keys beyond this make a meta file invalid; it bounds the time of [`Meta::set`].
const MOST_KEYS: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_values_are_replaced_in_place() {
        let mut meta: Meta = serde_json::from_str(r#"{"z": 1, "a": "x", "m": ["é\"", 2.5]}"#).unwrap();
        meta.set("a", 7);
        meta.set("b", "new");
        assert_eq!(
            meta.to_bytes(),
            "{\n  \"z\": 1,\n  \"a\": 7,\n  \"m\": [\n    \"é\\\"\",\n    2.5\n  ],\n  \"b\": \"new\"\n}".as_bytes()
        );
        assert_eq!(meta.get("z"), Some(&Value::from(1)));
    }

    #[test]
    fn duplicate_key_takes_the_last_value() {
        let meta: Meta = serde_json::from_str(r#"{"a": 1, "b": 2, "a": 3}"#).unwrap();
        assert_eq!(meta.to_bytes(), b"{\n  \"a\": 3,\n  \"b\": 2\n}");
    }

    #[test]
    fn agreement_ignores_order_but_no_key() {
        let parse = |text| serde_json::from_str::<Meta>(text).unwrap();
        let meta = parse(r#"{"a": 1, "b": 2}"#);
        assert!(meta.agrees(&parse(r#"{"b": 2, "a": 1}"#)));
        assert!(!meta.agrees(&parse(r#"{"a": 1}"#)));
        assert!(!meta.agrees(&parse(r#"{"a": 1, "b": 2, "c": 3}"#)));
        assert!(!meta.agrees(&parse(r#"{"a": 1, "b": 3}"#)));
    }
}
