//! The digest of a JSON value: the same for the same content, in whatever order keys stand.

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

/// The xxh3-128 of a value in its canonical form, 32 hexadecimal digits.
///
/// Canonical is: keys in ascending order of their bytes, no spaces, numbers and strings as `serde_json` writes them.
///
/// # Examples
/// ```
/// use serde_json::json;
///
/// let digest = gearbox::digest::of(&json!({ "a": 1, "b": [2.5, null] }));
/// assert_eq!(digest, gearbox::digest::of(&serde_json::from_str(r#"{ "b": [2.50, null], "a": 1 }"#).unwrap()));
/// assert_ne!(digest, gearbox::digest::of(&json!({ "a": 1, "b": [null, 2.5] })));
/// ```
pub fn of(value: &Value) -> String {
    let mut text = String::new();
    write(value, &mut text);
    format!("{:032x}", xxh3_128(text.as_bytes()))
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| key.as_bytes());
            text.push('{');
            for (idx, (key, value)) in entries.into_iter().enumerate() {
                text.push_str(if idx == 0 { "" } else { "," });
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                write(value, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (idx, item) in items.iter().enumerate() {
                text.push_str(if idx == 0 { "" } else { "," });
                write(item, text);
            }
            text.push(']');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn digest_depends_on_content_and_not_on_the_order_of_keys() {
        let read = |text: &str| of(&serde_json::from_str(text).unwrap());
        assert_eq!(read(r#"{ "b": { "y": 1, "x": 2 }, "a": [] }"#), read(r#"{"a":[],"b":{"x":2,"y":1}}"#));
        let texts = ["{}", "[]", "null", "0", "0.0", "\"0\"", r#"{"a":null}"#, r#"["a",null]"#, r#"[["a"],null]"#];
        let mut digests: Vec<_> = texts.iter().map(|text| read(text)).collect();
        digests.sort();
        digests.dedup();
        assert_eq!(digests.len(), texts.len());
        let mut canonical = String::new();
        write(&json!({ "b\"": [1, 2.5, "x"], "a": true }), &mut canonical);
        assert_eq!(canonical, r#"{"a":true,"b\"":[1,2.5,"x"]}"#);
    }
}
