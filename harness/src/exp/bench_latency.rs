//! `exp bench-latency`: how long do encode and decode of one entry take?
//!
//! The reference's figures come first, measured as it measures them: keys only, means, both directions in one throughput. Below them stand
//! keys and values, each direction apart, as least, median and 95th percentile.

use std::time::Instant;

use clap::{Args, ValueEnum};
use gearbox_core::{Chunk, Codec, Context, DType, Error, LaneRef, LaneSpec, Registry, Result, ResultExt, Role, Stage};
use gearbox_plugins::gear::{Frames, Streams};
use serde::Serialize;
use serde_json::json;

use crate::bench::Spread;
use crate::dump::{Dump, Entry};
use crate::exp::InputArgs;
use crate::receipt::Receipt;
use crate::report::{self, Columns};
use crate::status::Status;

/// Times encode and decode of every F16 entry, in one thread, warm, every result verified outside of the timed part.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The first lines repeat the reference: keys only, frames only in the ratio, and a throughput over encode and decode \
together in MiB/s.\nWith --verbose (-v) each entry has its line."
)]
pub struct BenchLatencyArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Effort of zstd: negative is fastest, 22 smallest, 0 the library's default
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    zstd_level: i32,
    /// Codec to time, with the frames of the reference
    #[arg(long, value_enum, default_value_t = Mode::GearDelta)]
    mode: Mode,
    /// Timed repeats of each entry, after one that is not timed
    #[arg(long, value_name = "REPEATS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    iters: u32,
    /// Time this many entries; 0 times all
    #[arg(long, value_name = "ENTRIES", default_value_t = 0)]
    limit: usize,
}

/// Which codec is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// High bytes as a delta along tokens
    GearDelta,
    /// High and low bytes
    Gear,
}

impl Mode {
    fn id(self) -> &'static str {
        match self {
            Self::GearDelta => "gear-delta",
            Self::Gear => "gear",
        }
    }
}

/// One timed tensor.
#[derive(Clone, Debug, Serialize)]
struct Timed {
    place: String,
    role: Role,
    stage: Stage,
    seq: usize,
    bytes: usize,
    /// Bytes that the codec writes.
    encoded_bytes: usize,
    /// Bytes of its two frames alone, as the reference counts.
    frame_bytes: usize,
    encode_ms: Spread,
    decode_ms: Spread,
    encode_mean_ms: f64,
    decode_mean_ms: f64,
}

impl Timed {
    /// The reference's ratio.
    fn ratio(&self) -> f64 {
        self.bytes as f64 / self.frame_bytes as f64
    }
}

impl BenchLatencyArgs {
    /// Runs the experiment and prints its figures.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if no F16 entry is left;
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if an entry does not come back; else what the codec reports.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let (dump, status) = self.input.open()?;
        let settings = json!({ "level": self.zstd_level, "mode": "reference" });
        let codec = registry.codec(self.mode.id())?.build(&settings)?;
        let timed = self.time(&dump, &*codec)?;
        if timed.is_empty() {
            return Err(Error::invalid_input(format!(
                "`{}`: expected at least one f16 entry, got none",
                self.input.dump_dir.display()
            )));
        }
        let reference = Reference::of(&timed);
        let summaries = summaries(&timed);
        if json {
            report::print_json(&json!({
                "receipt": Receipt::new(registry)?, "mode": self.mode.id(), "zstd_level": self.zstd_level, "iters": self.iters,
                "reference": reference, "summaries": summaries, "entries": timed,
            }))?;
            return Ok(status);
        }
        if tracing::enabled!(tracing::Level::INFO) {
            for tensor in timed.iter().filter(|tensor| tensor.role == Role::Key) {
                let (encode, decode) = (tensor.encode_mean_ms, tensor.decode_mean_ms);
                let line =
                    format!("{}: ratio={:.3} enc_ms={encode:.3} dec_ms={decode:.3}", tensor.place, tensor.ratio());
                report::print(&line)?;
            }
        }
        report::print(&format!("Mode: {}, zstd level: {}\n{reference}\n", self.mode.id(), self.zstd_level))?;
        report::print(&format!(
            "One thread, one warm-up, {} repeats, decoded bytes verified; spreads over entries of each entry's median\n\n{}",
            self.iters,
            table(&summaries)
        ))?;
        Ok(status)
    }

    /// Times keys and values of each selected F16 entry.
    fn time(&self, dump: &Dump, codec: &dyn Codec) -> Result<Vec<Timed>> {
        let is_f16 = |entry: &&Entry| entry.key.dtype == DType::F16 && entry.value.dtype == DType::F16;
        let entries = dump.iter().map(|(_, layer, entry)| (layer.id, entry)).filter(|(_, entry)| is_f16(entry));
        let limit = if self.limit == 0 { usize::MAX } else { self.limit };
        let progress = report::progress(dump.original_bytes(), "bench-latency");
        let mut bench = Bench::new(codec, self.mode, self.zstd_level, self.iters);
        let mut timed = Vec::new();
        for (layer, entry) in entries.take(limit) {
            for role in Role::ALL {
                timed.push(bench.time(layer, entry, role).context(|| format!("{}, {role}", entry.place))?);
            }
            progress.inc(entry.original_bytes());
        }
        progress.finish_and_clear();
        Ok(timed)
    }
}

/// A codec and the buffers that are used again for every tensor.
struct Bench<'a> {
    codec: &'a dyn Codec,
    mode: Mode,
    iters: u32,
    streams: Streams,
    frames: Frames,
    encoded: Vec<u8>,
    decoded: Vec<u8>,
}

impl<'a> Bench<'a> {
    fn new(codec: &'a dyn Codec, mode: Mode, level: i32, iters: u32) -> Self {
        let (encoded, decoded) = (Vec::new(), Vec::new());
        Self { codec, mode, iters, streams: Streams::default(), frames: Frames::new(level), encoded, decoded }
    }

    fn time(&mut self, layer: u32, entry: &Entry, role: Role) -> Result<Timed> {
        let tensor = entry.tensor(role);
        // A copy: pages of a mapped file would be read within the first measurement.
        let bytes = tensor.map()?.to_vec();
        let spec = LaneSpec::tensor(tensor.dtype, tensor.shape);
        let lane = LaneRef::new(&spec, &bytes)?;
        let context = Context::new(layer, role, entry.start);
        self.decoded.clear();
        self.decoded.resize(bytes.len(), 0);
        let (mut encode_ms, mut decode_ms) = (Vec::new(), Vec::new());
        for round in 0..=self.iters {
            self.encoded.clear();
            let start = Instant::now();
            self.codec.encode(lane, &context, &mut self.encoded)?;
            let encode = start.elapsed();
            let start = Instant::now();
            self.codec.decode(&self.encoded, &spec, &context, &mut self.decoded)?;
            let decode = start.elapsed();
            if self.decoded != bytes {
                return Err(Error::mismatch("decoded bytes differ from the input"));
            }
            if round > 0 {
                encode_ms.push(encode.as_secs_f64() * 1e3);
                decode_ms.push(decode.as_secs_f64() * 1e3);
            }
        }
        let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
        Ok(Timed {
            place: entry.place.clone(),
            role,
            stage: entry.stage,
            seq: entry.seq,
            bytes: bytes.len(),
            encoded_bytes: self.encoded.len(),
            frame_bytes: self.frame_bytes(Chunk::new(tensor.shape, tensor.dtype, &bytes)?)?,
            encode_mean_ms: mean(&encode_ms),
            decode_mean_ms: mean(&decode_ms),
            encode_ms: Spread::of(encode_ms),
            decode_ms: Spread::of(decode_ms),
        })
    }

    fn frame_bytes(&mut self, chunk: Chunk<'_>) -> Result<usize> {
        self.streams.split_both(chunk)?;
        let hi = if self.mode == Mode::Gear { self.streams.hi() } else { self.streams.hi_delta() };
        Ok(self.frames.compress(hi)?.len() + self.frames.compress(self.streams.lo())?.len())
    }
}

/// The reference's figures over keys.
#[derive(Clone, Copy, Debug, Serialize)]
struct Reference {
    dumps: usize,
    ratio: f64,
    encode_ms: f64,
    decode_ms: f64,
    /// Bytes of all keys in MiB ÷ mean time of encode and decode together.
    mib_per_s: f64,
}

impl Reference {
    fn of(timed: &[Timed]) -> Self {
        let keys: Vec<_> = timed.iter().filter(|tensor| tensor.role == Role::Key).collect();
        let count = keys.len() as f64;
        let encode_ms: f64 = keys.iter().map(|tensor| tensor.encode_mean_ms).sum();
        let decode_ms: f64 = keys.iter().map(|tensor| tensor.decode_mean_ms).sum();
        let bytes: usize = keys.iter().map(|tensor| tensor.bytes).sum();
        Self {
            dumps: keys.len(),
            ratio: keys.iter().map(|tensor| tensor.ratio()).sum::<f64>() / count,
            encode_ms: encode_ms / count,
            decode_ms: decode_ms / count,
            mib_per_s: bytes as f64 / f64::from(1 << 20) / (encode_ms + decode_ms) * 1e3,
        }
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Dumps: {}", self.dumps)?;
        writeln!(f, "Avg ratio: {:.3}", self.ratio)?;
        writeln!(f, "Avg encode: {:.3} ms", self.encode_ms)?;
        writeln!(f, "Avg decode: {:.3} ms", self.decode_ms)?;
        writeln!(f, "Avg total: {:.3} ms", self.encode_ms + self.decode_ms)?;
        write!(f, "Aggregate throughput: {:.3} MB/s", self.mib_per_s)
    }
}

/// Figures of one role and stage.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    role: Role,
    stage: Stage,
    tensors: usize,
    bytes: u64,
    encoded_bytes: u64,
    /// Over tensors, of each tensor's median.
    encode_ms: Spread,
    decode_ms: Spread,
    /// 10^6 bytes of tensors ÷ sum of medians.
    encode_mb_s: f64,
    decode_mb_s: f64,
}

fn summaries(timed: &[Timed]) -> Vec<Summary> {
    let mut summaries = Vec::new();
    for role in Role::ALL {
        for stage in [Stage::Prefill, Stage::Decode, Stage::Unknown] {
            let of: Vec<_> = timed.iter().filter(|tensor| tensor.role == role && tensor.stage == stage).collect();
            if of.is_empty() {
                continue;
            }
            let encode: Vec<f64> = of.iter().map(|tensor| tensor.encode_ms.median).collect();
            let decode: Vec<f64> = of.iter().map(|tensor| tensor.decode_ms.median).collect();
            let bytes: u64 = of.iter().map(|tensor| tensor.bytes as u64).sum();
            let rate = |times: &[f64]| bytes as f64 / times.iter().sum::<f64>() / 1e3;
            summaries.push(Summary {
                role,
                stage,
                tensors: of.len(),
                bytes,
                encoded_bytes: of.iter().map(|tensor| tensor.encoded_bytes as u64).sum(),
                encode_mb_s: rate(&encode),
                decode_mb_s: rate(&decode),
                encode_ms: Spread::of(encode),
                decode_ms: Spread::of(decode),
            });
        }
    }
    summaries
}

fn table(summaries: &[Summary]) -> Columns {
    let mut table = Columns::new(&[
        "role",
        "stage",
        ">entries",
        ">ratio",
        ">encode ms min / p50 / p95",
        ">decode ms min / p50 / p95",
        ">encode MB/s",
        ">decode MB/s",
    ]);
    let times = |spread: &Spread| format!("{:.3} / {:.3} / {:.3}", spread.min, spread.median, spread.p95);
    for summary in summaries {
        table.row([
            summary.role.to_string(),
            summary.stage.to_string(),
            summary.tensors.to_string(),
            report::ratio(summary.bytes, summary.encoded_bytes),
            times(&summary.encode_ms),
            times(&summary.decode_ms),
            format!("{:.0}", summary.encode_mb_s),
            format!("{:.0}", summary.decode_mb_s),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exp::samples::{parse, write_run};

    #[test]
    fn keys_and_values_of_f16_entries_are_timed() {
        let folder = tempfile::tempdir().unwrap();
        write_run(folder.path(), "a", DType::F16);
        write_run(folder.path(), "b", DType::F32);
        for mode in ["gear", "gear-delta"] {
            let dump_dir = folder.path().to_str().unwrap();
            let args: BenchLatencyArgs =
                parse(&["--dump-dir", dump_dir, "--iters", "1", "--mode", mode, "--limit", "1"]).unwrap();
            let registry = gearbox_plugins::registry().unwrap();
            assert_eq!(args.run(&registry, false).unwrap(), Status::Pass);
            let codec = registry.codec(mode).unwrap().build(&json!({"mode": "reference"})).unwrap();
            let timed = args.time(&args.input.open().unwrap().0, &*codec).unwrap();
            let frames: Vec<_> = timed.iter().map(|tensor| (tensor.role, tensor.frame_bytes)).collect();
            let [key, value] = if mode == "gear" { [1790, 1843] } else { [1765, 1796] };
            assert_eq!(frames, [(Role::Key, key + 8202), (Role::Value, value + 8202)]);
        }
    }

    #[test]
    fn no_f16_entry_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        write_run(folder.path(), "b", DType::F32);
        let args: BenchLatencyArgs = parse(&["--dump-dir", folder.path().to_str().unwrap()]).unwrap();
        let error = args.run(&gearbox_plugins::registry().unwrap(), false).unwrap_err().to_string();
        assert!(error.ends_with("expected at least one f16 entry, got none"), "{error}");
        assert!(parse::<BenchLatencyArgs>(&["--dump-dir", "x", "--iters", "0"]).is_err());
    }

    fn timed(role: Role, bytes: usize, frame_bytes: usize, mean_ms: f64) -> Timed {
        let spread = Spread::of(vec![mean_ms]);
        Timed {
            place: "meta_t0_1.json".to_owned(),
            role,
            stage: Stage::Prefill,
            seq: 1,
            bytes,
            encoded_bytes: frame_bytes + 4,
            frame_bytes,
            encode_ms: spread,
            decode_ms: spread,
            encode_mean_ms: mean_ms,
            decode_mean_ms: 3.0 * mean_ms,
        }
    }

    #[test]
    fn reference_figures_are_unweighted_means_over_keys() {
        let all = [
            timed(Role::Key, 1 << 20, 1 << 19, 1.0),
            timed(Role::Value, 5, 5, 9.0),
            timed(Role::Key, 1 << 20, 1 << 20, 3.0),
        ];
        let text = "Dumps: 2\nAvg ratio: 1.500\nAvg encode: 2.000 ms\nAvg decode: 6.000 ms\nAvg total: 8.000 ms\n\
                    Aggregate throughput: 125.000 MB/s";
        assert_eq!(Reference::of(&all).to_string(), text);
    }

    #[test]
    fn summaries_keep_roles_apart() {
        let all = [timed(Role::Key, 2_000_000, 1, 1.0), timed(Role::Value, 4_000_000, 1, 1.0)];
        let rates: Vec<_> = summaries(&all).iter().map(|summary| format!("{:.3}", summary.encode_mb_s)).collect();
        assert_eq!(rates, ["2000.000", "4000.000"]);
    }
}
