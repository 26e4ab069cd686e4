//! zstd frames: one-shot, with their content size, without checksum or dictionary.

use std::fmt;
use std::time::{Duration, Instant};

use gearbox_core::{Error, Result};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, compress_bound, find_frame_compressed_size, get_frame_content_size};

/// Writes frames of any level with one context, and knows how long zstd took.
#[derive(Default)]
pub(crate) struct Frames {
    context: Compressor<'static>,
    time: Duration,
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Frames")
    }
}

impl Frames {
    /// Replaces `frame` by the frame of `data`, the same one as a new context writes.
    pub fn compress(&mut self, level: i32, data: &[u8], frame: &mut Vec<u8>) -> Result<()> {
        let start = Instant::now();
        frame.clear();
        frame.reserve(compress_bound(data.len()));
        let level_set = self.context.set_parameter(CParameter::CompressionLevel(level));
        let written = level_set.and_then(|()| self.context.compress_to_buffer(data, frame));
        self.time += start.elapsed();
        written.map(|_| ()).map_err(|error| Error::unsupported(format!("zstd level {level} fails: {error}")))
    }

    /// Time spent in zstd since the last call.
    pub fn take_time(&mut self) -> Duration {
        std::mem::take(&mut self.time)
    }
}

/// Reads frames with one context.
#[derive(Default)]
pub(crate) struct Unframer(Decompressor<'static>);

impl fmt::Debug for Unframer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unframer")
    }
}

impl Unframer {
    /// Fills `out` with the content of `frame`, which must be one whole frame of just as many bytes.
    pub fn decompress(&mut self, frame: &[u8], out: &mut [u8]) -> Result<()> {
        let sound = get_frame_content_size(frame).is_ok_and(|size| size == Some(out.len() as u64))
            && find_frame_compressed_size(frame) == Ok(frame.len());
        if !sound {
            return Err(Error::corrupt(format!("expected one zstd frame of {} bytes, got something else", out.len())));
        }
        match self.0.decompress_to_buffer(frame, out) {
            Ok(len) if len == out.len() => Ok(()),
            Ok(len) => Err(Error::corrupt(format!("expected {} bytes in a zstd frame, got {len}", out.len()))),
            Err(error) => Err(Error::corrupt(format!("damaged zstd frame: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_lengths_of_the_reference() {
        let mut frame = b"before".to_vec();
        let ramp: Vec<u8> = (0..32).collect();
        for (data, len) in [(&[][..], 9), (&[0], 10), (&ramp, 41), (&[0; 32], 17), (&[0; 300], 19)] {
            Frames::default().compress(3, data, &mut frame).unwrap();
            assert_eq!(frame.len(), len, "{} bytes", data.len());
        }
    }

    #[test]
    fn frames_do_not_depend_on_what_the_context_did_before() {
        let mut frames = Frames::default();
        let mut frame = Vec::new();
        for (round, len) in [0_usize, 70_000, 1, 300_000, 128, 8192, 8191].into_iter().cycle().take(35).enumerate() {
            let level = [3, 1, 3, -5, 7][round % 5];
            let data: Vec<u8> = (0..len).map(|i| ((i * i * 31 + round) >> 7) as u8 % 50).collect();
            frames.compress(level, &data, &mut frame).unwrap();
            assert_eq!(frame, zstd::bulk::compress(&data, level).unwrap(), "round {round}: {len} bytes, level {level}");
        }
    }
}
