//! Plugins that only the tests of isolation use: one of each kind that misbehaves on request and tells what it was told.

use std::fmt::Debug;
use std::io::Write as _;
use std::os::unix::fs::FileExt;

use gearbox_core::{
    AnyEntry, Artifact, AttentionStep, Bound, CacheGeometry, CacheView, Capabilities, Chunk, ChunkMut, Codec, Context,
    ElemSet, Entry, Error, EvictionPolicy, EvictionSession, KeepSet, LaneRef, LaneSpec, Latents, LossyTransform,
    Plugin, Registry, Result, Retention, Sample, Shape,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What to do, and in which callback.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the callback.
    at: String,
    /// Name of the deed; empty for none.
    act: String,
}

impl Config {
    /// Does it, if this is the place.
    pub fn at(&self, place: &str) {
        if self.at != place {
            return;
        }
        match self.act.as_str() {
            "panic" => panic!("as the test asked, at {place}"),
            "abort" => std::process::abort(),
            "exit" => leave(),
            "kill" => {
                let me = std::process::id().to_string();
                std::process::Command::new("kill").args(["-9", &me]).status().unwrap();
            }
            "overflow" => {
                std::hint::black_box(deep(0));
            }
            "spin" => loop {
                std::hint::black_box(0);
            },
            "sleep" => std::thread::sleep(std::time::Duration::from_hours(1)),
            "allocate" => {
                let mut held: Vec<Vec<u8>> = Vec::new();
                loop {
                    held.push(Vec::with_capacity(std::hint::black_box(64 << 20)));
                }
            }
            "print" => {
                println!("this would not be a frame");
                eprintln!("seen on standard error");
                std::io::stdout().flush().unwrap();
                assert_eq!(std::io::stdin().read_line(&mut String::new()).unwrap(), 0, "frames are not for plugins");
            }
            "complain" => {
                for line in 0..100_000 {
                    eprintln!("complaint {line}");
                }
                std::process::abort();
            }
            "garbage" => {
                for fd in 3..64 {
                    if let Ok(mut pipe) = std::fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")) {
                        let _ = pipe.write_all(b"garbage garbage garbage");
                    }
                }
            }
            _ => {}
        }
    }

    pub fn is(&self, act: &str) -> bool {
        self.act == act
    }
}

#[expect(clippy::disallowed_methods, reason = "plugins may do it all the same")]
fn leave() {
    std::process::exit(0)
}

/// Writes one byte behind the end, without `unsafe` and as rude.
fn overwrite(out: &[u8]) {
    let memory = std::fs::File::options().write(true).open("/proc/self/mem").unwrap();
    memory.write_all_at(&[1], (out.as_ptr().addr() + out.len()) as u64).unwrap();
}

#[expect(unconditional_recursion, reason = "the stack is to end")]
fn deep(depth: u64) -> u64 {
    let here = std::hint::black_box([depth; 512]);
    deep(depth + 1) + here[17]
}

/// Everything that a context tells, as text.
fn told(cx: &Context<'_>) -> String {
    let chunk = |chunk: Option<Chunk<'_>>| chunk.map(|chunk| (chunk.shape(), chunk.dtype(), chunk.bytes().to_vec()));
    format!(
        "{} {} {} {:?} {:?} {:?} {:?} {:?} {:?}",
        cx.layer,
        cx.role,
        cx.first_token,
        cx.end_token,
        cx.tokens,
        cx.rope,
        chunk(cx.peer),
        chunk(cx.history),
        cx.history_tokens
    )
}

macro_rules! plugin {
    ($name:ident, $id:literal) => {
        impl Plugin for $name {
            const ID: &'static str = $id;
            const SUMMARY: &'static str = "misbehaves on request";
            const SOURCE: &'static str = "own work";
            const FORMAT_VERSION: u32 = 3;
            type Config = Config;

            fn new(config: Config) -> Result<Self> {
                config.at("new");
                if config.is("refuse") {
                    return Err(Error::invalid_config("refused"));
                }
                Ok(Self::from(config))
            }
        }
    };
}

/// Stores what it was told, then the lane.
#[derive(Debug, Default)]
pub struct HostileCodec {
    config: Config,
    artifact: Vec<u8>,
}

impl From<Config> for HostileCodec {
    fn from(config: Config) -> Self {
        Self { config, artifact: Vec::new() }
    }
}

plugin!(HostileCodec, "hostile-codec");

impl Codec for HostileCodec {
    fn capabilities(&self) -> Capabilities {
        self.config.at("capabilities");
        Capabilities { streaming: true, ..Capabilities::new(ElemSet::U8.or(ElemSet::BITS)) }
    }

    fn config(&self) -> Value {
        self.config.at("config");
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        self.config.at("max_encoded_len");
        lane.byte_len() + 4096
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        self.config.at("encode");
        if self.config.is("refuse-lane") {
            return Err(Error::unsupported(format!("{}: refused", lane.spec())));
        }
        if self.config.is("longer") {
            out.resize(lane.bytes().len() + 4097, 0);
        }
        out.extend(told(cx).into_bytes());
        out.extend(&self.artifact);
        out.extend(lane.bytes());
        Ok(())
    }

    /// Only if a deed is asked for here.
    fn encode_into(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut [u8]) -> Result<Option<usize>> {
        if self.config.at != "encode_into" {
            return Ok(None);
        }
        self.config.at("encode_into");
        let mut encoded = Vec::new();
        self.encode(lane, cx, &mut encoded)?;
        out[..encoded.len()].copy_from_slice(&encoded);
        if self.config.is("overwrite") {
            overwrite(out);
        }
        Ok(Some(if self.config.is("claim") { out.len() + 1 } else { encoded.len() }))
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        self.config.at("decode");
        if self.config.is("overwrite") {
            overwrite(out);
        }
        let head = [told(cx).as_bytes(), &self.artifact].concat();
        let lane = encoded.strip_prefix(&head[..]).filter(|lane| lane.len() == out.len());
        out.copy_from_slice(lane.ok_or_else(|| Error::corrupt("told something else"))?);
        Ok(())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        self.config.at("train");
        let mut learnt = Vec::new();
        for sample in samples {
            self.config.at("sample");
            learnt.extend(format!("{} {} {} {:?};", sample.spec, sample.layer, sample.role, sample.bytes).into_bytes());
        }
        Ok((!learnt.is_empty()).then_some(Artifact(learnt)))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<std::sync::Arc<dyn Codec>>> {
        self.config.at("with_artifact");
        if artifact.is_empty() {
            return Ok(None);
        }
        Ok(Some(std::sync::Arc::new(Self { config: self.config.clone(), artifact: artifact.to_vec() })))
    }
}

/// Two lanes: the bytes, and what it was told.
#[derive(Debug, Default)]
pub struct HostileTransform {
    config: Config,
}

impl From<Config> for HostileTransform {
    fn from(config: Config) -> Self {
        Self { config }
    }
}

plugin!(HostileTransform, "hostile-transform");

impl LossyTransform for HostileTransform {
    fn capabilities(&self) -> Capabilities {
        self.config.at("capabilities");
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn effective_config(&self, role: gearbox_core::Role, dim: usize) -> Value {
        self.config.at("effective_config");
        json!([role, dim, self.config])
    }

    fn bound(&self) -> Bound {
        self.config.at("bound");
        Bound::Absolute(f64::MAX)
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        self.config.at("forward");
        let told = told(cx).into_bytes();
        let room = out.push(LaneSpec::new("bytes", gearbox_core::Elem::U8, Shape::flat(chunk.bytes().len())))?;
        room.copy_from_slice(chunk.bytes());
        let room = out.push(LaneSpec::new("told", gearbox_core::Elem::Bits(8), Shape::flat(told.len())))?;
        room.copy_from_slice(&told);
        Ok(())
    }

    fn alternative(&self, _: Chunk<'_>, latents: &Latents) -> Result<Option<Latents>> {
        self.config.at("alternative");
        Ok(self.config.is("alternative").then(|| latents.clone()))
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        self.config.at("inverse");
        if latents.lane("told")?.bytes != told(cx).into_bytes() {
            return Err(Error::corrupt("told something else"));
        }
        out.bytes_mut().copy_from_slice(&latents.lane("bytes")?.bytes);
        Ok(())
    }
}

/// Keeps the tokens that had the most attention so far: half of them, per KV head.
#[derive(Debug, Default)]
pub struct HostilePolicy {
    config: Config,
}

impl From<Config> for HostilePolicy {
    fn from(config: Config) -> Self {
        Self { config }
    }
}

plugin!(HostilePolicy, "hostile-policy");

struct HostileSession {
    config: Config,
    geometry: CacheGeometry,
    /// By position, one list per KV head.
    sums: Vec<Vec<f32>>,
}

impl EvictionPolicy for HostilePolicy {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        self.config.at("retention");
        Retention { most: Some(seen), sinks: geometry.layer.into(), recent: u64::from(geometry.layers) }
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        self.config.at("session");
        let sums = vec![Vec::new(); geometry.kv_heads];
        Ok(Box::new(HostileSession { config: self.config.clone(), geometry: *geometry, sums }))
    }
}

impl EvictionSession for HostileSession {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        self.config.at("observe");
        let group = self.geometry.q_heads / self.geometry.kv_heads;
        let row = step.tokens;
        for (idx, probability) in step.probabilities.iter().enumerate() {
            let head = idx / row % self.geometry.q_heads / group;
            let position = step.row(head)[idx % row] as usize;
            let sums = &mut self.sums[head];
            sums.resize(sums.len().max(position + 1), 0.0);
            sums[position] += probability * (1.0 + step.first_query as f32);
        }
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        self.config.at("plan");
        if cache.seen < 4 {
            return Ok(KeepSet::All);
        }
        let heads = self.sums.iter().enumerate().map(|(head, sums)| {
            let live = cache.row(head);
            let mut order: Vec<u32> = (0..cache.tokens as u32).collect();
            order.sort_by(|a, b| {
                let sum = |idx: u32| sums.get(live[idx as usize] as usize).copied().unwrap_or_default();
                sum(*b).total_cmp(&sum(*a))
            });
            order.truncate(cache.tokens / 2);
            order.sort_unstable();
            order
        });
        let heads: Vec<_> = heads.collect();
        Ok(if self.config.is("share") { KeepSet::Shared(heads[0].clone()) } else { KeepSet::PerHead(heads) })
    }
}

/// The built-ins and the plugins of this module.
pub fn registry() -> Result<Registry> {
    let mut registry = gearbox_plugins::registry()?;
    let origin = "tests";
    registry.insert(AnyEntry::Codec(Entry::of::<HostileCodec>(origin, |codec| std::sync::Arc::new(codec))))?;
    registry.insert(AnyEntry::Transform(Entry::of::<HostileTransform>(origin, |it| std::sync::Arc::new(it))))?;
    registry.insert(AnyEntry::Eviction(Entry::of::<HostilePolicy>(origin, |policy| std::sync::Arc::new(policy))))?;
    Ok(registry)
}
