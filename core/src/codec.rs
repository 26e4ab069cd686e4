//! Lossless codecs: lane to bytes and back.

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

use serde_json::Value;

use crate::{Capabilities, Context, LaneRef, LaneSpec, Result, Role};

/// A lane that a codec may learn from before anything is encoded.
#[derive(Debug)]
pub struct Sample<'a> {
    /// Name, element type and shape.
    pub spec: LaneSpec,
    /// The elements, little-endian.
    pub bytes: Cow<'a, [u8]>,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
}

/// Bytes of a trained model: stored once per container, always counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact(pub Vec<u8>);

/// Lossless: lane to bytes. The caller owns buffers: encode appends, decode fills.
///
/// One instance serves many threads at once. It spawns none itself.
pub trait Codec: Send + Sync + Debug {
    /// Which lanes it takes, and what it needs to know.
    fn capabilities(&self) -> Capabilities;

    /// The settings with every default filled in; stored in containers.
    ///
    /// Building from them again gives the same settings.
    fn config(&self) -> Value;

    /// The most bytes that [`Codec::encode`] appends for such a lane.
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize;

    /// Appends the encoded lane to `out` and leaves what is there alone.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for lanes outside the declared capabilities.
    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()>;

    /// Writes to the start of `out` what [`Codec::encode`] appends, and says how many bytes that is; `None`, as here, if it can only append.
    ///
    /// `out` has room for [`Codec::max_encoded_len`] bytes or more, and holds anything. Hosts that call a codec in another library or process ask
    /// for this first: what was appended has to be copied once more, which only the fastest codecs notice.
    ///
    /// # Errors
    /// As [`Codec::encode`].
    fn encode_into(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut [u8]) -> Result<Option<usize>> {
        let _ = (lane, cx, out);
        Ok(None)
    }

    /// Fills `out`, which has exactly the length of the lane.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if `encoded` is not what [`Codec::encode`] writes for such a lane. Never panics,
    /// and allocates no more than a small multiple of the lane.
    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()>;

    /// Learns a model over many lanes, such as a global codebook. Most codecs learn nothing.
    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        let _ = samples;
        Ok(None)
    }

    /// This codec with a trained model, or `None` if it takes none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if the bytes are not an artifact of this codec.
    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        let _ = artifact;
        Ok(None)
    }
}
