//! Containers written by earlier versions are read for ever, byte for byte.
//!
//! A file in `goldens/` is written once, by the version that added the feature (`GEARBOX_BLESS=1` writes missing ones), and never again.

mod common;

use std::path::Path;

use common::{CHAIN, RUNS, decode, loaded, pipeline, sample};
use gearbox_core::container::Container;
use gearbox_core::{Limits, Pipeline};

#[test]
fn goldens_decode_and_are_written_the_same_today() {
    let written = [
        ("v1_0_tensor.gbx", pipeline(RUNS)),
        ("v1_0_lanes.gbx", pipeline(CHAIN)),
        ("v1_1_library.gbx", Pipeline::build(pipeline(RUNS).spec(), &loaded("runs")).unwrap()),
    ];
    for (name, mut pipeline) in written {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name);
        let (bytes, tensors, _) = sample(&mut pipeline);
        if !path.exists() && std::env::var_os("GEARBOX_BLESS").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(decode(&golden).unwrap(), tensors, "{name}");
        let container = Container::open(golden.as_slice(), &Limits::default()).unwrap();
        assert_eq!(container.header().plugins, pipeline.plugins(), "{name}");
        assert_eq!(records(&golden), records(&bytes), "{name}: the format changed without a new version");
    }
}

/// The file without its header, which names the program's version, and without the trailer, which says where the index is.
fn records(file: &[u8]) -> &[u8] {
    let json = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    &file[16 + json + 4..file.len() - 20]
}
