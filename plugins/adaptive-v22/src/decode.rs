//! Reading streams.

use gearbox_core::{Error, Result, ResultExt, Shape};

use crate::frame::Unframer;
use crate::{FRAMED, HEADER, Predictor, SHUFFLED, bitshuffle, blocks};

/// Decodes lanes one after another with the same context and buffers.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    unframer: Unframer,
    /// Content of the streams, the most significant bytes first.
    streams: Vec<u8>,
    /// Content of a frame before its bits are put back.
    shuffled: Vec<u8>,
}

/// A stream as it is stored.
struct Stored<'a> {
    form: u8,
    block_seq: usize,
    modes: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Stored<'a> {
    /// Takes the first stream off `encoded`.
    fn take(encoded: &mut &'a [u8], shape: Shape) -> Result<Self> {
        let cut = |what: &str, rest: &[u8]| Error::corrupt(format!("expected {what}, got {} bytes", rest.len()));
        let (header, rest) = encoded.split_first_chunk::<HEADER>().ok_or_else(|| cut("a header", encoded))?;
        let [form, a, b, c, len @ ..] = *header;
        let (block_seq, len) = (u32::from_le_bytes([a, b, c, 0]) as usize, u32::from_le_bytes(len) as usize);
        let sound = match form {
            0 => block_seq == 0,
            FRAMED | 3 => (1..=shape.seq).contains(&block_seq),
            _ => false,
        };
        if !sound {
            return Err(Error::corrupt(format!("form {form} with blocks of {block_seq} tokens is unknown")));
        }
        let count = if form == 0 { 0 } else { blocks(shape, block_seq) };
        let (modes, rest) = rest.split_at_checked(count).ok_or_else(|| cut(&format!("{count} modes"), rest))?;
        let (payload, rest) = rest.split_at_checked(len).ok_or_else(|| cut(&format!("{len} bytes"), rest))?;
        *encoded = rest;
        Ok(Self { form, block_seq, modes, payload })
    }
}

impl Decoder {
    /// Fills `out`, whose length is that of the shape.
    pub fn decode(&mut self, mut encoded: &[u8], shape: Shape, out: &mut [u8]) -> Result<()> {
        let elements = shape.elements();
        if elements > 0 {
            self.streams.resize(out.len(), 0);
            let mut streams = std::mem::take(&mut self.streams);
            let read = streams.chunks_mut(elements).enumerate().try_for_each(|(idx, stream)| {
                self.stream(&mut encoded, shape, stream).context(|| format!("stream {idx}"))
            });
            self.streams = streams;
            read?;
            join(&self.streams, elements, out);
        }
        if encoded.is_empty() {
            return Ok(());
        }
        Err(Error::corrupt(format!("expected the end, got {} more bytes", encoded.len())))
    }

    fn stream(&mut self, encoded: &mut &[u8], shape: Shape, stream: &mut [u8]) -> Result<()> {
        let Stored { form, block_seq, modes, payload } = Stored::take(encoded, shape)?;
        if form == 0 {
            if payload.len() != stream.len() {
                return Err(Error::corrupt(format!("expected {} bytes, got {}", stream.len(), payload.len())));
            }
            stream.copy_from_slice(payload);
            return Ok(());
        }
        let row = shape.row();
        let block_len = block_seq * row;
        if form & SHUFFLED == 0 {
            self.unframer.decompress(payload, stream)?;
        } else {
            self.shuffled.resize(stream.len(), 0);
            self.unframer.decompress(payload, &mut self.shuffled)?;
            for (bits, block) in self.shuffled.chunks(block_len).zip(stream.chunks_mut(block_len)) {
                bitshuffle::unshuffle(bits, block);
            }
        }
        for (block, mode) in stream.chunks_mut(block_len).zip(modes) {
            let predictor =
                Predictor::of_mode(*mode).ok_or_else(|| Error::corrupt(format!("predictor {mode} is unknown")))?;
            predictor.inverse(block, row, shape.dim);
        }
        Ok(())
    }
}

/// Puts the bytes of elements together.
fn join(streams: &[u8], elements: usize, out: &mut [u8]) {
    match out.len() / elements {
        2 => {
            let (high, low) = streams.split_at(elements);
            for ((word, high), low) in out.as_chunks_mut::<2>().0.iter_mut().zip(high).zip(low) {
                *word = [*low, *high];
            }
        }
        size => {
            for (place, stream) in streams.chunks(elements).enumerate() {
                for (word, byte) in out.chunks_mut(size).zip(stream) {
                    word[size - 1 - place] = *byte;
                }
            }
        }
    }
}
