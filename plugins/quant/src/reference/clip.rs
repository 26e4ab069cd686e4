//! Clipping to percentiles, or to some standard deviations around the mean, of the whole tensor.

use gearbox_core::Chunk;

use super::element::{Element, map, widen, with_element};
use super::pairwise::{mean, sum};

/// How the bounds of [`clip`] are found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// Percentiles of the finite values, linear between two of them.
    Percentile {
        /// Lower bound, 0 to 100.
        low: f64,
        /// Upper bound, 0 to 100.
        high: f64,
    },
    /// Mean of the finite values, plus and minus this many standard deviations.
    Sigma(f64),
}

/// The bounds of a tensor, or `None` if no element is finite. [`clip`] rounds them to the element type.
pub fn clip_bounds(chunk: Chunk<'_>, clip: Clip) -> Option<(f64, f64)> {
    with_element!(chunk.dtype(), E => match clip {
        Clip::Percentile { low, high } => {
            let mut sorted = Sorted::new::<E>(chunk.bytes());
            Some((sorted.percentile::<E>(low)?, sorted.percentile::<E>(high)?))
        }
        Clip::Sigma(count) => {
            let mut values = Vec::new();
            widen(chunk, &mut values);
            values.retain(|value| value.is_finite());
            if values.is_empty() {
                return None;
            }
            let middle = mean(sum(&values, #[inline(always)] move |x| x), values.len());
            let squares = sum(&values, #[inline(always)] move |x| (x - middle) * (x - middle));
            let deviation = mean(squares, values.len()).sqrt();
            let (middle, reach) = (f64::from(middle), count * f64::from(deviation));
            Some((middle - reach, middle + reach))
        }
    })
}

/// Appends a tensor whose values are moved to the bounds where they lie outside, in its own element type.
///
/// NaN stays NaN, and infinities go to the bounds. A zero keeps its sign where a bound is zero, which `NumPy` leaves open. A tensor without finite values stays as it is. Bounds in the wrong order send every
/// value to the second one.
pub fn clip(chunk: Chunk<'_>, clip: Clip, out: &mut Vec<u8>) {
    let Some((low, high)) = clip_bounds(chunk, clip) else {
        out.extend_from_slice(chunk.bytes());
        return;
    };
    with_element!(chunk.dtype(), E => {
        let (mut low_bytes, high_bytes) = (E::narrow_f64(low), E::narrow_f64(high));
        let (low, high) = (E::widen(low_bytes), E::widen(high_bytes));
        if low > high {
            low_bytes = high_bytes;
        }
        // Sums beyond the largest F32 leave no bounds, and nothing passes a comparison with those.
        let lost = low.is_nan() || high.is_nan();
        let nan = E::narrow(f32::NAN);
        map::<E>(chunk.bytes(), out, #[inline(always)] move |bytes| {
            let value = E::widen(bytes);
            let below = if value < low { low_bytes } else { bytes };
            let inside = if value > high { high_bytes } else { below };
            if lost { nan } else { inside }
        });
    });
}

/// The finite values of a tensor in ascending order, as far as that is needed.
enum Sorted {
    /// How often each of the values of a two-byte type occurs, by its ordered bits.
    Counts { counts: Vec<u32>, total: usize },
    /// Ordered bits; in order only around the places that were asked for.
    Keys(Vec<u32>),
}

impl Sorted {
    /// From this many elements on, counting 65 536 values is quicker than sorting.
    const COUNTED: usize = 4096;

    fn new<E: Element>(bytes: &[u8]) -> Self {
        let elements = E::elements(bytes);
        let infinite = E::magnitude(E::narrow(f32::INFINITY));
        let finite = elements.iter().filter(|bytes| E::magnitude(**bytes) < infinite);
        if size_of::<E::Bytes>() > 2 || elements.len() < Self::COUNTED {
            return Self::Keys(finite.map(|bytes| E::ordered(*bytes)).collect());
        }
        let mut counts = vec![0_u32; 1 << 16];
        let mut total = 0;
        for bytes in finite {
            counts[E::ordered(*bytes) as usize & 0xFFFF] += 1;
            total += 1;
        }
        Self::Counts { counts, total }
    }

    fn len(&self) -> usize {
        match self {
            Self::Counts { total, .. } => *total,
            Self::Keys(keys) => keys.len(),
        }
    }

    /// The values at a place and behind it; the last one twice at the end.
    fn pair(&mut self, place: usize) -> (u32, u32) {
        match self {
            Self::Counts { counts, .. } => {
                let mut before = 0;
                let mut found = None;
                for (key, &count) in (0..).zip(&*counts) {
                    before += count as usize;
                    if found.is_none() && before > place {
                        found = Some(key);
                    }
                    if before > place + 1 {
                        return (found.unwrap_or(key), key);
                    }
                }
                let last = found.unwrap_or_default();
                (last, last)
            }
            Self::Keys(keys) => {
                let (_, key, behind) = keys.select_nth_unstable(place);
                (*key, behind.iter().copied().min().unwrap_or(*key))
            }
        }
    }

    /// Linear interpolation between two values; place and weight in F64, the rest in F32.
    fn percentile<E: Element>(&mut self, percent: f64) -> Option<f64> {
        let last = self.len().checked_sub(1)?;
        let place = last as f64 * (percent / 100.0);
        if place >= last as f64 {
            return Some(f64::from(E::of_ordered(self.pair(last).0)));
        }
        let floor = place.floor().max(0.0);
        #[expect(clippy::cast_sign_loss, reason = "not below 0, and below the number of values")]
        let (low, high) = self.pair(floor as usize);
        let (low, high) = (E::of_ordered(low), E::of_ordered(high));
        let (weight, difference) = (place - floor, high - low);
        let value =
            if weight < 0.5 { low + difference * weight as f32 } else { high - difference * (1.0 - weight) as f32 };
        Some(f64::from(value))
    }
}
