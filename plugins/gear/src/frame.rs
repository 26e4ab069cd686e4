//! Zstandard frames with reused contexts.

use std::io::Cursor;

use gearbox_core::{Error, ErrorKind, Result};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

/// Writes zstd frames, one after another, with one context and one buffer.
///
/// Every frame is the one that `zstd::bulk::compress` writes: content size in the header, no checksum, no dictionary.
///
/// # Examples
/// ```
/// use gearbox_gear::Frames;
///
/// let mut frames = Frames::new(3);
/// assert!(frames.compress(&[7; 1000]).unwrap().len() < 30);
/// ```
pub struct Frames {
    level: i32,
    context: Option<Compressor<'static>>,
    frame: Vec<u8>,
}

impl Frames {
    /// A writer at a zstd level, -7 to 22; the context is made when it is first needed.
    pub fn new(level: i32) -> Self {
        Self { level, context: None, frame: Vec::new() }
    }

    /// Compresses `data` into one frame, which stays valid until the next call.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if zstd refuses, as it does when memory is short.
    pub fn compress(&mut self, data: &[u8]) -> Result<&[u8]> {
        self.frame.clear();
        let mut frame = std::mem::take(&mut self.frame);
        let result = self.append(data, &mut frame);
        self.frame = frame;
        result.map(|()| &*self.frame)
    }

    /// Appends the frame of `data` to `out`.
    ///
    /// # Errors
    /// As [`Frames::compress`].
    pub fn append(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(Compressor::new(self.level).map_err(|error| refused(&error))?),
        };
        out.reserve(zstd_safe::compress_bound(data.len()));
        let mut tail = Cursor::new(out);
        tail.set_position(tail.get_ref().len() as u64);
        context.compress_to_buffer(data, &mut tail).map_err(|error| refused(&error))?;
        Ok(())
    }
}

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frames(level {})", self.level)
    }
}

fn refused(error: &std::io::Error) -> Error {
    Error::new(ErrorKind::Unsupported, format!("zstd cannot compress: {error}"))
}

/// Reads zstd frames with one context.
#[derive(Default)]
pub(crate) struct Unframer {
    context: Option<Decompressor<'static>>,
}

impl std::fmt::Debug for Unframer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unframer")
    }
}

impl Unframer {
    /// Replaces `out` by the content of `frame`, which must be exactly one frame of `len` bytes of content.
    pub(crate) fn decompress(&mut self, frame: &[u8], len: usize, out: &mut Vec<u8>) -> Result<()> {
        match zstd_safe::get_frame_content_size(frame) {
            Ok(Some(size)) if size == len as u64 => {}
            Ok(Some(size)) => return Err(Error::corrupt(format!("expected a zstd frame of {len} bytes, got {size}"))),
            _ => return Err(Error::corrupt("expected a zstd frame with its content size, got something else")),
        }
        // Behind the frame the decoder would accept more of them.
        if zstd_safe::find_frame_compressed_size(frame) != Ok(frame.len()) {
            return Err(Error::corrupt(format!("{} bytes are not exactly one zstd frame", frame.len())));
        }
        let damaged = |error: std::io::Error| Error::corrupt(format!("damaged zstd frame: {error}"));
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(Decompressor::new().map_err(damaged)?),
        };
        out.clear();
        out.reserve(len);
        let got = context.decompress_to_buffer(frame, out).map_err(damaged)?;
        if got == len {
            return Ok(());
        }
        Err(Error::corrupt(format!("expected {len} bytes in a zstd frame, got {got}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).rotate_left(7) >> 11) as u8).collect()
    }

    #[test]
    fn frames_equal_one_shot_frames_whatever_came_before() {
        let mut frames = Frames::new(3);
        for len in [0, 1, 255, 70_000, 256, 3, 300_000, 1] {
            for data in [noise(len), noise(len).iter().map(|byte| byte % 5).collect()] {
                let expected = zstd::bulk::compress(&data, 3).unwrap();
                assert_eq!(frames.compress(&data).unwrap(), expected, "{len} bytes");
            }
        }
    }

    #[test]
    fn append_leaves_what_is_there() {
        let mut out = b"before".to_vec();
        Frames::new(3).append(&[1; 100], &mut out).unwrap();
        assert_eq!(&out[..6], b"before");
        let mut content = Vec::new();
        Unframer::default().decompress(&out[6..], 100, &mut content).unwrap();
        assert_eq!(content, [1; 100]);
    }

    #[test]
    fn decompress_refuses_everything_but_one_whole_frame() {
        let frame = zstd::bulk::compress(&noise(100), 3).unwrap();
        let twice = [frame.clone(), frame.clone()].concat();
        let empty_behind = [frame.clone(), zstd::bulk::compress(&[], 3).unwrap()].concat();
        let mut streamed = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
        std::io::Write::write_all(&mut streamed, &noise(100)).unwrap();
        let without_size = streamed.finish().unwrap();
        let mut out = Vec::with_capacity(1000);
        for (bytes, len, what) in [
            (&frame[..], 99, "another length"),
            (&frame[..frame.len() - 1], 100, "cut short"),
            (&twice[..], 100, "two frames"),
            (&empty_behind[..], 100, "an empty frame behind"),
            (&without_size[..], 100, "no content size"),
            (&b"plain"[..], 5, "no frame"),
            (&[][..], 0, "nothing"),
        ] {
            let error = Unframer::default().decompress(bytes, len, &mut out).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        }
    }
}
