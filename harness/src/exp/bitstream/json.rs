//! JSON as the reference reads and writes it: objects keep the order of their keys at every depth, and every item has its own line.

use std::fmt::{Display, Write as _};

use gearbox_core::{Error, Result};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Number;

use crate::exp::text::Float;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Json>),
    Object(Object),
}

/// A JSON object in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Object(Vec<(String, Json)>);

/// Keys beyond this make an object invalid; it bounds the time of [`Object::set`].
const MOST_KEYS: usize = 1000;

impl Object {
    pub fn get(&self, key: &str) -> Option<&Json> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Replaces a value in its place, or appends it.
    pub fn set(&mut self, key: &str, value: impl Into<Json>) {
        let value = value.into();
        if let Some((_, place)) = self.0.iter_mut().find(|(name, _)| name == key) {
            *place = value;
        } else {
            self.0.push((key.to_owned(), value));
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.0.retain(|(name, _)| name != key);
    }

    /// A text that must be there.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.get(key) {
            Some(Json::String(text)) => Ok(text),
            found => Err(unexpected(key, "a text", found)),
        }
    }

    /// A whole number that must be there.
    pub fn number(&self, key: &str) -> Result<u64> {
        let found = self.get(key);
        found.and_then(Json::as_u64).ok_or_else(|| unexpected(key, "a number of at least 0", found))
    }

    /// A list of whole numbers that must be there.
    pub fn numbers(&self, key: &str) -> Result<Vec<u64>> {
        let found = self.get(key);
        let numbers = match found {
            Some(Json::Array(items)) => items.iter().map(Json::as_u64).collect(),
            _ => None,
        };
        numbers.ok_or_else(|| unexpected(key, "a list of numbers of at least 0", found))
    }

    /// Two spaces per level, non-ASCII as it is, no line end behind the last line.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = String::new();
        write_object(self, 0, &mut text);
        text.into_bytes()
    }
}

fn unexpected(key: &str, expected: &str, found: Option<&Json>) -> Error {
    let got = match found {
        None => "nothing".to_owned(),
        Some(Json::Array(_)) => "a list".to_owned(),
        Some(Json::Object(_)) => "an object".to_owned(),
        Some(value) => format!("`{value}`"),
    };
    Error::invalid_input(format!("`{key}`: expected {expected}, got {got}"))
}

impl Json {
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Number(number) => number.as_u64(),
            _ => None,
        }
    }
}

impl From<u64> for Json {
    fn from(number: u64) -> Self {
        Self::Number(number.into())
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// A value as the reference prints it in a table.
impl Display for Json {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("None"),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
            Self::Number(number) => write_number(number, f),
            Self::String(text) => f.write_str(text),
            Self::Array(_) | Self::Object(_) => {
                let mut text = String::new();
                write_value(self, 0, &mut text);
                f.write_str(&text)
            }
        }
    }
}

fn write_number(number: &Number, out: &mut impl std::fmt::Write) -> std::fmt::Result {
    match number.as_f64().filter(|_| number.is_f64()) {
        Some(float) => write!(out, "{}", Float(float)),
        None => write!(out, "{number}"),
    }
}

fn write_value(value: &Json, level: usize, out: &mut String) {
    match value {
        Json::Null => out.push_str("null"),
        Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        // Writing to a string cannot fail.
        Json::Number(number) => write_number(number, out).unwrap_or_default(),
        Json::String(text) => write_text(text, out),
        Json::Array(items) => write_items('[', ']', items, level, out, |item, out| write_value(item, level + 1, out)),
        Json::Object(object) => write_object(object, level, out),
    }
}

fn write_object(object: &Object, level: usize, out: &mut String) {
    write_items('{', '}', &object.0, level, out, |(key, value), out| {
        write_text(key, out);
        out.push_str(": ");
        write_value(value, level + 1, out);
    });
}

fn write_text(text: &str, out: &mut String) {
    let _ = write!(out, "{}", serde_json::Value::from(text));
}

fn write_items<T>(
    open: char,
    close: char,
    items: &[T],
    level: usize,
    out: &mut String,
    write: impl Fn(&T, &mut String),
) {
    let indent = |level: usize, out: &mut String| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", level));
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        indent(level + 1, out);
        write(item, out);
    }
    if !items.is_empty() {
        indent(level, out);
    }
    out.push(close);
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Json::deserialize(deserializer)? {
            Json::Object(object) => Ok(object),
            _ => Err(serde::de::Error::custom("expected an object, got another JSON value")),
        }
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Json;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Json, E> {
        Ok(Number::from_f64(value).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Json, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Json, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element()? {
            array.push(item);
        }
        Ok(Json::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Json, A::Error> {
        let mut object = Object::default();
        while let Some((key, value)) = entries.next_entry::<String, Json>()? {
            if object.0.len() == MOST_KEYS {
                return Err(serde::de::Error::custom(format_args!("expected at most {MOST_KEYS} keys")));
            }
            object.set(&key, value);
        }
        Ok(Json::Object(object))
    }
}
