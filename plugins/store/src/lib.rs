//! Stores lanes as they are: the baseline that every other codec has to beat.
//!
//! Elements of whole bytes are copied. [`Elem::Bits`] lanes are bit-packed, least significant bit first, because that is what "as they
//! are" means for them: `ceil(elements * bits / 8)` bytes, with zeros behind the last element.
//!
//! # Source
//! Own work.
//!
//! # Settings
//! None.
//!
//! # What it is bad at
//! Everything but speed. Its compression ratio is 1 on tensors, and `8 * size / bits` against bytes in memory on narrow codes.

use gearbox_core::{
    Capabilities, Codec, Context, Elem, ElemSet, Error, LaneRef, LaneSpec, Plugin, Result, bits, register_codec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`Store`]: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {}

/// Stores lanes as they are, bit-packed where elements are narrower than a byte.
#[derive(Clone, Debug)]
pub struct Store {
    config: Config,
}

impl Plugin for Store {
    const ID: &'static str = "store";
    const SUMMARY: &'static str = "stores the lane as it is, narrow elements bit-packed";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

register_codec!(Store);

impl Codec for Store {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        match lane.elem {
            Elem::Bits(width) => bits::packed_len(width, lane.shape.elements()),
            _ => lane.byte_len(),
        }
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        if let Elem::Bits(width) = lane.spec().elem {
            return bits::pack(width, lane.bytes(), out);
        }
        out.extend_from_slice(lane.bytes());
        Ok(())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        if let Elem::Bits(width) = lane.elem {
            return bits::unpack(width, encoded, out);
        }
        if encoded.len() != out.len() {
            return Err(Error::corrupt(format!("expected {} stored bytes, got {}", out.len(), encoded.len())));
        }
        out.copy_from_slice(encoded);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{ErrorKind, Role, Shape};

    use super::*;

    const CX: Context<'_> = Context::new(0, Role::Key, 0);

    fn encode(elem: Elem, bytes: &[u8]) -> Result<Vec<u8>> {
        let spec = LaneSpec::new("codes", elem, Shape::flat(bytes.len() / elem.size()));
        let mut out = Vec::new();
        Store { config: Config {} }.encode(LaneRef::new(&spec, bytes)?, &CX, &mut out)?;
        Ok(out)
    }

    fn decode(elem: Elem, elements: usize, encoded: &[u8]) -> Result<Vec<u8>> {
        let spec = LaneSpec::new("codes", elem, Shape::flat(elements));
        let mut out = vec![0; spec.byte_len()];
        Store { config: Config {} }.decode(encoded, &spec, &CX, &mut out)?;
        Ok(out)
    }

    #[test]
    fn whole_bytes_are_copied() {
        for elem in [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32] {
            assert_eq!(encode(elem, &[1, 2, 3, 4]).unwrap(), [1, 2, 3, 4], "{elem}");
        }
    }

    #[test]
    fn narrow_elements_are_packed() {
        assert_eq!(encode(Elem::Bits(4), &[1, 2, 3]).unwrap(), [0x21, 0x03]);
        assert_eq!(encode(Elem::Bits(12), &[0xBC, 0x0A, 0x23, 0x01]).unwrap(), [0xBC, 0x3A, 0x12]);
    }

    #[test]
    fn encode_refuses_values_above_the_width() {
        let error = encode(Elem::Bits(4), &[1, 16]).unwrap_err();
        assert_eq!(error.to_string(), "element 1: expected at most 15 (4 bits), got 16");
    }

    #[test]
    fn encode_refuses_widths_that_do_not_exist() {
        for bits in [0, 17, 255] {
            assert_eq!(encode(Elem::Bits(bits), &[0, 0]).unwrap_err().kind(), ErrorKind::Unsupported, "{bits} bits");
        }
    }

    #[test]
    fn decode_rejects_wrong_lengths_and_padding() {
        let message = |elem, elements, encoded: &[u8]| {
            let error = decode(elem, elements, encoded).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            error.to_string()
        };
        assert_eq!(message(Elem::U16, 2, &[1, 2, 3]), "expected 4 stored bytes, got 3");
        assert_eq!(
            message(Elem::Bits(3), 3, &[0xFF, 0x02]),
            "expected zero bits behind the last element, got last byte 0x02"
        );
    }
}
