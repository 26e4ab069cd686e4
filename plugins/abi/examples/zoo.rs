//! A library of odd plugins, for the tests of the loader and for the benchmark of what the boundary costs.

use std::fmt::Write as _;
use std::sync::Arc;

use gearbox_abi::Level;
use gearbox_core::{
    Artifact, AttentionStep, CacheGeometry, CacheView, Capabilities, Codec, Context, ElemSet, Error, ErrorKind,
    EvictionPolicy, EvictionSession, KeepSet, LaneRef, LaneSpec, Needs, Plugin, Result, Retention, Sample,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

gearbox_abi::export_plugins! {
    codecs: [Copy, CopyViaVec, Odd, Learner, Witness],
    evictions: [Keeper],
}

/// No settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Nothing {}

macro_rules! plugin {
    ($name:ident, $config:ty, $id:literal) => {
        #[derive(Debug)]
        struct $name($config);

        impl Plugin for $name {
            const ID: &'static str = $id;
            const ALIASES: &'static [&'static str] = &[concat!("former-", $id)];
            const SUMMARY: &'static str = "for tests";
            const SOURCE: &'static str = "own work";
            const FORMAT_VERSION: u32 = 3;
            type Config = $config;

            fn new(config: $config) -> Result<Self> {
                Ok(Self(config))
            }
        }
    };
}

fn copied(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    if encoded.len() != out.len() {
        return Err(Error::corrupt(format!("expected {} bytes, got {}", out.len(), encoded.len())));
    }
    out.copy_from_slice(encoded);
    Ok(())
}

plugin!(Copy, Nothing, "copy");
plugin!(CopyViaVec, Nothing, "copy-via-vec");

/// The same codec under both ids; one writes in place.
macro_rules! copy {
    ($name:ident $($in_place:item)?) => {
        impl Codec for $name {
            fn capabilities(&self) -> Capabilities {
                Capabilities::new(ElemSet::ALL)
            }

            fn config(&self) -> Value {
                json!(self.0)
            }

            fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
                lane.byte_len()
            }

            fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
                out.extend_from_slice(lane.bytes());
                Ok(())
            }

            $($in_place)?

            fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
                copied(encoded, out)
            }
        }
    };
}

copy!(
    Copy
    fn encode_into(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut [u8]) -> Result<Option<usize>> {
        let lane = lane.bytes();
        out[..lane.len()].copy_from_slice(lane);
        Ok(Some(lane.len()))
    }
);
copy!(CopyViaVec);

/// What the odd codec does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    #[default]
    Nothing,
    PanicInNew,
    PanicInConfig,
    PanicInMax,
    PanicInEncode,
    PanicInDecode,
    PanicInDrop,
    FailInNew,
    FailInEncode,
    Exceed,
}

/// Settings of the odd codec.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct OddConfig {
    /// What it does wrong.
    mode: Mode,
}

#[derive(Debug)]
struct Odd(OddConfig);

impl Plugin for Odd {
    const ID: &'static str = "odd";
    const SUMMARY: &'static str = "for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = OddConfig;

    fn new(config: OddConfig) -> Result<Self> {
        assert!(config.mode != Mode::PanicInNew, "in new");
        if config.mode == Mode::FailInNew {
            return Err(Error::invalid_config("`/mode`: expected another mode").context("odd"));
        }
        Ok(Self(config))
    }
}

impl Drop for Odd {
    fn drop(&mut self) {
        assert!(self.0.mode != Mode::PanicInDrop, "in drop");
    }
}

impl Codec for Odd {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        assert!(self.0.mode != Mode::PanicInConfig, "in config");
        json!(self.0)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        assert!(self.0.mode != Mode::PanicInMax, "in max_encoded_len");
        lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        assert!(self.0.mode != Mode::PanicInEncode, "in encode of {}", lane.spec());
        if self.0.mode == Mode::FailInEncode {
            return Err(Error::new(ErrorKind::LimitExceeded, "expected less"));
        }
        out.extend_from_slice(lane.bytes());
        if self.0.mode == Mode::Exceed {
            out.push(0);
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        assert!(self.0.mode != Mode::PanicInDecode, "in decode");
        copied(encoded, out)
    }
}

plugin!(Learner, Nothing, "learner");

/// Learns the sum of all bytes, and adds it to each.
#[derive(Debug)]
struct Learned(u8);

impl Codec for Learner {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.0)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        Learned(0).encode(lane, cx, out)
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        Learned(0).decode(encoded, lane, cx, out)
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        let (mut sum, mut any) = (0u8, false);
        for sample in samples {
            any = true;
            sum = sample.bytes.iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
            gearbox_abi::log(Level::Info, &format!("{} of layer {}, {}", sample.spec, sample.layer, sample.role));
        }
        Ok(any.then_some(Artifact(vec![sum])))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        match artifact {
            [] => Ok(None),
            [sum] => Ok(Some(Arc::new(Learned(*sum)))),
            _ => Err(Error::corrupt(format!("expected 1 byte, got {}", artifact.len()))),
        }
    }
}

impl Codec for Learned {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        out.extend(lane.bytes().iter().map(|byte| byte.wrapping_add(self.0)));
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        copied(encoded, out)?;
        for byte in out {
            *byte = byte.wrapping_sub(self.0);
        }
        Ok(())
    }
}

plugin!(Witness, Nothing, "witness");

/// Writes what it sees of the context, and needs all of it.
impl Codec for Witness {
    fn capabilities(&self) -> Capabilities {
        let needs = Needs { tokens: true, rope: true, peer: true, history: true };
        Capabilities { needs, streaming: true, deterministic: false, ..Capabilities::new(ElemSet::ALL) }
    }

    fn config(&self) -> Value {
        json!(self.0)
    }

    fn max_encoded_len(&self, _: &LaneSpec) -> usize {
        10_000
    }

    fn encode(&self, _: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let mut text = format!("{cx:?}");
        for chunk in [cx.peer, cx.history].into_iter().flatten() {
            let _ = write!(text, " {:?}", chunk.bytes());
        }
        out.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn decode(&self, _: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        out.fill(gearbox_abi::threads() as u8);
        Ok(())
    }
}

/// Settings of the policy.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct KeeperConfig {
    /// `all`, `shared`, `heads`, or what is wrong: `outside`, `unordered`, `few`, `panic`.
    mode: String,
}

plugin!(Keeper, KeeperConfig, "keeper");

struct Session {
    mode: String,
    geometry: CacheGeometry,
    /// Position of the last query.
    last: u64,
    sum: f32,
}

impl EvictionPolicy for Keeper {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.0)
    }

    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        Retention { most: (seen > 9).then_some(geometry.kv_heads as u64), sinks: seen, recent: geometry.layer.into() }
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        if geometry.kv_heads == 0 {
            return Err(Error::invalid_config("expected at least one KV head, got none"));
        }
        Ok(Box::new(Session { mode: self.0.mode.clone(), geometry: *geometry, last: 0, sum: 0.0 }))
    }
}

impl EvictionSession for Session {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        self.last = step.first_query + step.queries as u64 - 1;
        self.sum += step.probabilities.iter().sum::<f32>();
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let live = cache.tokens as u32;
        Ok(match self.mode.as_str() {
            "all" => KeepSet::All,
            "shared" => KeepSet::Shared(vec![0, self.last as u32 % live]),
            "heads" => KeepSet::PerHead((0..self.geometry.kv_heads as u32).map(|head| vec![head]).collect()),
            "outside" => KeepSet::Shared(vec![live]),
            "unordered" => KeepSet::Shared(vec![1, 0]),
            "uneven" => KeepSet::PerHead(vec![vec![0], vec![0, 1]]),
            "many" => KeepSet::Shared((0..=live).collect()),
            "few" => KeepSet::PerHead(vec![vec![]]),
            _ => panic!("after probabilities of {}", self.sum),
        })
    }
}
