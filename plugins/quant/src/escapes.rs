//! Elements that are stored as they are, and their places as gaps.

use gearbox_core::{Elem, Error, Lane, LaneSpec, Result, Shape};

/// Name of the lane with the elements.
pub(crate) const VALUES: &str = "outliers";
/// Name of the lane with the gaps.
pub(crate) const GAPS: &str = "outlier-gaps";

/// Widths of a gap that are tried.
const WIDTHS: std::ops::RangeInclusive<u8> = 2..=16;

/// The gaps between ascending places: how many elements lie between two of them, or before the first.
///
/// A gap that does not fit into its width is several: the largest number stands for as many elements, and no escape behind them.
pub(crate) fn gaps(places: &[usize]) -> Lane {
    let widths = WIDTHS.map(|bits| {
        let most = (1 << bits) - 1;
        let numbers: usize = between(places).map(|gap| gap / most + 1).sum();
        (numbers * usize::from(bits), bits)
    });
    let (_, bits) = widths.min().unwrap_or((0, 16));
    let most = (1 << bits) - 1;
    let mut numbers = Vec::new();
    for gap in between(places) {
        numbers.extend(std::iter::repeat_n(most, gap / most));
        numbers.push(gap % most);
    }
    let size = Elem::Bits(bits).size();
    let bytes = numbers.iter().flat_map(|number| (*number as u16).to_le_bytes().into_iter().take(size)).collect();
    Lane { spec: LaneSpec::new(GAPS, Elem::Bits(bits), Shape::flat(numbers.len())), bytes }
}

fn between(places: &[usize]) -> impl Iterator<Item = usize> {
    let ends = std::iter::once(0).chain(places.iter().map(|place| place + 1));
    places.iter().zip(ends).map(|(place, end)| place - end)
}

/// Places from their gaps: `count` of them, all below `end`.
pub(crate) fn places(lane: &Lane, count: usize, end: usize) -> Result<Vec<usize>> {
    let Elem::Bits(bits) = lane.spec.elem else {
        return Err(Error::corrupt(format!("expected bits, got {}", lane.spec)));
    };
    if !WIDTHS.contains(&bits) {
        return Err(Error::corrupt(format!("expected a width of 2 to 16 bits, got {}", lane.spec)));
    }
    let most = usize::from(u16::MAX >> (16 - bits));
    let mut places = Vec::new();
    let mut place = 0usize;
    for number in lane.bytes.chunks_exact(lane.spec.elem.size()) {
        let number = number.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte));
        // Both are small, and the number of gaps is that of a lane in memory: no overflow.
        place += number;
        if number < most {
            if place >= end {
                return Err(Error::corrupt(format!("{}: place {place}, expected less than {end}", lane.spec)));
            }
            places.push(place);
            place += 1;
        }
    }
    if places.len() == count {
        return Ok(places);
    }
    Err(Error::corrupt(format!("{}: expected {count} places, got {}", lane.spec, places.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_whatever_the_gaps() {
        let far: Vec<usize> = (0..50).map(|i| i * i * 97 + i).collect();
        for list in [vec![0], vec![5], vec![0, 1, 2, 3], vec![2, 3, 70_000, 400_000], far, (0..300).collect()] {
            let lane = gaps(&list);
            assert_eq!(places(&lane, list.len(), list[list.len() - 1] + 1).unwrap(), list, "{}", lane.spec);
        }
        assert_eq!(gaps(&[0, 1, 2]).bytes, [0, 0, 0]);
        // 3 elements, which is a whole number of two bits, and one more.
        assert_eq!((gaps(&[4]).spec.elem, gaps(&[4]).bytes), (Elem::Bits(3), vec![4]));
    }

    #[test]
    fn width_is_near_the_best_for_the_density() {
        let lane = gaps(&(0..1000).map(|i| i * 100 + i * 37 % 90).collect::<Vec<_>>());
        let Elem::Bits(bits) = lane.spec.elem else { panic!() };
        assert!((7..=8).contains(&bits) && lane.spec.shape.seq < 1050, "{}", lane.spec);
    }

    #[test]
    fn damaged_gaps_are_corrupt() {
        let lane = gaps(&[3, 9]);
        let message = |lane: &Lane, count, end| places(lane, count, end).unwrap_err().to_string();
        assert!(message(&lane, 2, 9).contains("place 9, expected less than 9"));
        assert!(message(&lane, 1, 10).contains("expected 1 places, got 2"));
        let other = Lane { spec: LaneSpec::new(GAPS, Elem::U8, Shape::flat(2)), bytes: vec![3, 5] };
        assert!(message(&other, 2, 10).contains("expected bits"));
    }
}
