//! What the boundary costs: a codec that copies, built in, in a Rust library and in a C library; and the time to load a library.
//!
//! `cargo bench -p gearbox-abi`. One thread. The first table alternates the arms within one loop, so that they see the same machine, and
//! prints the median of each and its ratio to the built-in; criterion's own figures follow.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use gearbox_abi::{Host, Source, load};
use gearbox_core::{
    AnyEntry, Capabilities, Codec, Context, Elem, ElemSet, Error, LaneRef, LaneSpec, Result, Role, Shape,
};
use serde_json::{Value, json};

/// The codec that the libraries hold, linked in.
#[derive(Debug)]
struct BuiltIn;

impl Codec for BuiltIn {
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
        out.extend_from_slice(lane.bytes());
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        if encoded.len() != out.len() {
            return Err(Error::corrupt("wrong length"));
        }
        out.copy_from_slice(encoded);
        Ok(())
    }
}

/// Folder of this build's artifacts, such as `target/release`.
fn artifacts() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(2).unwrap().to_owned()
}

fn rust_library(profile: &str, folder: &str) -> PathBuf {
    let target = artifacts().parent().unwrap().to_owned();
    let cargo = Command::new(env!("CARGO"))
        .args(["build", "--profile", profile, "-p", "gearbox-abi", "--example", "zoo", "--target-dir"])
        .arg(&target)
        .status();
    assert!(cargo.unwrap().success());
    let name = format!("{}zoo{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    target.join(folder).join("examples").join(name)
}

fn c_library(folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = folder.join(format!("copy{}", std::env::consts::DLL_SUFFIX));
    let cc = Command::new("cc")
        .args(["-std=c11", "-O2", "-shared", "-fPIC", "-I"])
        .arg(root.join("include"))
        .arg(root.join("benches/copy.c"))
        .arg("-o")
        .arg(&library)
        .status();
    assert!(cc.unwrap().success());
    library
}

fn codec(path: &Path, id: &str) -> Arc<dyn Codec> {
    let host = Host { guarded: false, ..Host::default() };
    let library = load(&Source::from(path), &host).unwrap();
    let found = library.entries.iter().find(|entry| entry.id() == id).unwrap();
    let AnyEntry::Codec(entry) = found else { unreachable!("a codec") };
    entry.build(&json!({})).unwrap()
}

/// Asks this program to load a library, as one that has loaded none before.
const LOAD: &str = "--load";

/// Loads a library and prints how many nanoseconds that took, and its digest then.
fn time_load(path: &Path) {
    let start = Instant::now();
    let library = load(&Source::from(path), &Host::default()).unwrap();
    let loaded = start.elapsed();
    let start = Instant::now();
    library.sha256().unwrap();
    println!("{} {}", loaded.as_nanos(), start.elapsed().as_nanos());
}

fn loading(libraries: &[(&str, &Path)]) {
    let mut times = vec![[const { Vec::new() }; 2]; libraries.len()];
    for _ in 0..31 {
        for ((_, path), times) in libraries.iter().zip(&mut times) {
            let output = Command::new(std::env::current_exe().unwrap()).arg(LOAD).arg(path).output().unwrap();
            let printed = String::from_utf8(output.stdout).unwrap();
            for (time, times) in printed.split_whitespace().zip(times) {
                times.push(time.parse().unwrap());
            }
        }
    }
    for ((name, path), [load, digest]) in libraries.iter().zip(times) {
        let (load, digest) = (median(load) / 1e6, median(digest) / 1e6);
        let len = std::fs::metadata(path).unwrap().len();
        println!("load {name}: {load:.2} ms for {len} bytes, their SHA-256 {digest:.2} ms");
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

const SIZES: [usize; 8] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];

fn bench(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let (rust, c) = (rust_library("release", "release"), c_library(folder.path()));
    loading(&[("c", &c), ("rust", &rust), ("rust, dev profile", &rust_library("dev", "debug"))]);
    let arms: [(&str, Arc<dyn Codec>); 4] = [
        ("built-in", Arc::new(BuiltIn)),
        ("rust, in place", codec(&rust, "copy")),
        ("rust, via Vec", codec(&rust, "copy-via-vec")),
        ("c", codec(&c, "copy")),
    ];
    let cx = Context::new(0, Role::Key, 0);
    let lanes: Vec<(LaneSpec, Vec<u8>)> = SIZES
        .iter()
        .map(|size| (LaneSpec::new("tensor", Elem::F16, Shape::new(size / 256, 1, 128)), vec![0x5A; *size]))
        .collect();
    println!("{:>10} {:>8} {:>16} {:>14} {:>8}", "bytes", "", "arm", "median ns", "ratio");
    for (spec, bytes) in &lanes {
        // As the chunk coder does: one buffer for all chunks.
        let (mut out, mut back) = (Vec::with_capacity(bytes.len() + 64), vec![0; bytes.len()]);
        let rounds = (1 << 30) / bytes.len().max(1 << 17);
        let mut times = vec![[const { Vec::new() }; 2]; arms.len()];
        for _ in 0..rounds.max(31) {
            for ((_, codec), times) in arms.iter().zip(&mut times) {
                let lane = LaneRef::new(spec, bytes).unwrap();
                out.clear();
                let start = Instant::now();
                codec.encode(black_box(lane), &cx, &mut out).unwrap();
                times[0].push(start.elapsed().as_nanos() as f64);
                let start = Instant::now();
                codec.decode(black_box(&out), spec, &cx, &mut back).unwrap();
                times[1].push(start.elapsed().as_nanos() as f64);
            }
        }
        let medians: Vec<[f64; 2]> = times.into_iter().map(|arm| arm.map(median)).collect();
        for (idx, what) in ["encode", "decode"].into_iter().enumerate() {
            for ((name, _), arm) in arms.iter().zip(&medians) {
                println!(
                    "{:>10} {what:>8} {name:>16} {:>14.0} {:>8.4}",
                    bytes.len(),
                    arm[idx],
                    arm[idx] / medians[0][idx]
                );
            }
        }
    }
    let mut group = criterion.benchmark_group("copy");
    for (spec, bytes) in lanes.iter().filter(|(_, bytes)| [4 << 10, 1 << 20, 64 << 20].contains(&bytes.len())) {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        for (name, codec) in &arms {
            let mut out = Vec::with_capacity(bytes.len() + 64);
            group.bench_function(BenchmarkId::new(format!("encode {name}"), bytes.len()), |b| {
                b.iter(|| {
                    out.clear();
                    codec.encode(black_box(LaneRef::new(spec, bytes).unwrap()), &cx, &mut out).unwrap();
                });
            });
            let mut back = vec![0; bytes.len()];
            group.bench_function(BenchmarkId::new(format!("decode {name}"), bytes.len()), |b| {
                b.iter(|| codec.decode(black_box(bytes), spec, &cx, &mut back).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench);

fn main() {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != LOAD).skip(1);
    if let Some(path) = arguments.next() {
        return time_load(path.as_ref());
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
