//! A library for the tests of sweeps: a codec that misbehaves on request and is `zstd` for the rest, and the transform and the policy of the
//! tests of isolation.

mod plugins;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use gearbox_core::{Artifact, Capabilities, Codec, Context, ElemSet, LaneRef, LaneSpec, Plugin, Result, Sample};
use serde_json::{Value, json};

gearbox_abi::export_plugins! {
    codecs: [Rude],
    transforms: [plugins::HostileTransform],
    evictions: [plugins::HostilePolicy],
}

/// `zstd` with bad manners; one byte before its frame has no meaning.
#[derive(Debug)]
struct Rude {
    config: plugins::Config,
    zstd: Arc<dyn Codec>,
}

impl Plugin for Rude {
    const ID: &'static str = "rude";
    const SUMMARY: &'static str = "misbehaves on request";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = plugins::Config;

    fn new(config: plugins::Config) -> Result<Self> {
        config.at("new");
        Ok(Self { config, zstd: plugins::registry()?.codec("zstd")?.build(&json!({}))? })
    }
}

impl Codec for Rude {
    fn capabilities(&self) -> Capabilities {
        self.config.at("capabilities");
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        self.config.at("config");
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        self.config.at("max_encoded_len");
        self.zstd.max_encoded_len(lane) + 1
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        self.config.at("encode");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
        out.push(if self.config.is("random") { (now / 64) as u8 } else { 0 });
        if self.config.is("longer") {
            out.resize(out.len() + self.max_encoded_len(lane.spec()), 0);
        }
        self.zstd.encode(lane, cx, out)
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        self.config.at("decode");
        self.zstd.decode(encoded.get(1..).unwrap_or_default(), lane, cx, out)?;
        if let Some(byte) = out.last_mut().filter(|_| self.config.is("wrong")) {
            *byte ^= 1;
        }
        Ok(())
    }

    fn train(&self, _: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        self.config.at("train");
        Ok(None)
    }
}
