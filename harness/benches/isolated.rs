//! What isolation costs: a codec that copies, linked in and in a process of its own.
//!
//! `cargo bench -p gearbox --bench isolated`. One caller. The arms alternate within one loop, so that they see the same machine; printed are
//! the median of each and its ratio to the built-in, which is one `memcpy`.

use std::hint::black_box;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use gearbox::isolate::{Isolation, Limits, Spawn};
use gearbox_core::{AnyEntry, Codec, Context, Elem, LaneRef, LaneSpec, Role, Shape};
use serde_json::json;

/// The library of odd plugins of `plugins/abi`.
fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let artifacts = own.ancestors().nth(2).unwrap();
    let cargo = Command::new(env!("CARGO"))
        .args(["build", "--release", "-p", "gearbox-abi", "--example", "zoo", "--target-dir"])
        .arg(artifacts.parent().unwrap())
        .status();
    assert!(cargo.unwrap().success());
    artifacts.join(format!("examples/{}zoo{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
}

fn built(entries: &[AnyEntry], id: &str) -> Arc<dyn Codec> {
    let Some(AnyEntry::Codec(entry)) = entries.iter().find(|entry| entry.id() == id) else { unreachable!("a codec") };
    entry.build(&json!({})).unwrap()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let spawn = Spawn::program(env!("CARGO_BIN_EXE_gearbox"), &[library()]);
    let start = Instant::now();
    let isolated = Isolation::new(spawn, Limits::default()).entries().unwrap();
    println!("a worker with a library is there after {:?}", start.elapsed());
    let built_in: Vec<_> = gearbox_plugins::registry().unwrap().entries().cloned().collect();
    let arms = [
        ("built-in", built(&built_in, "store")),
        ("in place", built(&isolated, "copy")),
        ("via Vec", built(&isolated, "copy-via-vec")),
    ];
    let cx = Context::new(0, Role::Key, 0);
    println!("{:>10} {:>8} {:>10} {:>14} {:>8}", "bytes", "", "arm", "median ns", "ratio");
    for size in [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20] {
        let spec = LaneSpec::new("tensor", Elem::F16, Shape::new(size / 256, 1, 128));
        let lane = vec![0x5A; size];
        // As the chunk coder does: one buffer for all chunks.
        let (mut out, mut back) = (Vec::with_capacity(size + 64), vec![0; size]);
        let rounds = (1 << 29) / size.max(1 << 18);
        let mut times = vec![[const { Vec::new() }; 2]; arms.len()];
        for _ in 0..rounds {
            for ((_, codec), times) in arms.iter().zip(&mut times) {
                out.clear();
                let start = Instant::now();
                codec.encode(black_box(LaneRef::new(&spec, &lane).unwrap()), &cx, &mut out).unwrap();
                times[0].push(start.elapsed().as_nanos() as f64);
                let start = Instant::now();
                codec.decode(black_box(&out), &spec, &cx, &mut back).unwrap();
                times[1].push(start.elapsed().as_nanos() as f64);
            }
        }
        let medians: Vec<[f64; 2]> = times.iter_mut().map(|arm| arm.each_mut().map(|times| median(times))).collect();
        for (idx, what) in ["encode", "decode"].into_iter().enumerate() {
            for ((name, _), arm) in arms.iter().zip(&medians) {
                println!("{size:>10} {what:>8} {name:>10} {:>14.0} {:>8.2}", arm[idx], arm[idx] / medians[0][idx]);
            }
        }
    }
}
