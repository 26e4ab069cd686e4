//! The conformance kit on `huffman` and `arithmetic`.

use gearbox_bitstream as _;

gearbox_conformance::codec_tests!(huffman, "huffman");
gearbox_conformance::codec_tests!(huffman_per_dump, "huffman", json!({"codebook": "per-dump"}));
gearbox_conformance::codec_tests!(huffman_reference, "huffman", json!({"mode": "reference"}));
gearbox_conformance::codec_tests!(arithmetic, "arithmetic");
gearbox_conformance::codec_tests!(arithmetic_per_dump, "arithmetic", json!({"codebook": "per-dump"}));
gearbox_conformance::codec_tests!(arithmetic_reference, "arithmetic", json!({"mode": "reference"}));
