//! The random numbers of the reference's language, so that a seed means the same order.

const LEN: usize = 624;
const AHEAD: usize = 397;

/// MT19937 (Matsumoto and Nishimura, *Mersenne Twister*, 1998).
pub(super) struct Twister {
    state: [u32; LEN],
    next: usize,
}

impl Twister {
    /// Seeds it with the 32-bit words of a number, the lowest first.
    pub fn new(seed: u64) -> Self {
        let words = [seed as u32, (seed >> 32) as u32];
        let key = if words[1] == 0 { &words[..1] } else { &words };
        let mut state = [19_650_218_u32; LEN];
        for i in 1..LEN {
            state[i] = 1_812_433_253_u32.wrapping_mul(state[i - 1] ^ state[i - 1] >> 30).wrapping_add(i as u32);
        }
        // Two passes over the state, the second without the key.
        let mut i = 1;
        for step in 0..LEN + LEN - 1 {
            let mixed = |factor: u32| state[i] ^ (state[i - 1] ^ state[i - 1] >> 30).wrapping_mul(factor);
            state[i] = if step < LEN {
                let j = step % key.len();
                mixed(1_664_525).wrapping_add(key[j]).wrapping_add(j as u32)
            } else {
                mixed(1_566_083_941).wrapping_sub(i as u32)
            };
            i += 1;
            if i == LEN {
                state[0] = state[LEN - 1];
                i = 1;
            }
        }
        state[0] = 1 << 31;
        Self { state, next: LEN }
    }

    fn next(&mut self) -> u32 {
        if self.next == LEN {
            for i in 0..LEN {
                let joined = self.state[i] & 1 << 31 | self.state[(i + 1) % LEN] & !(1 << 31);
                let twist = if joined & 1 == 1 { 0x9908_B0DF } else { 0 };
                self.state[i] = self.state[(i + AHEAD) % LEN] ^ joined >> 1 ^ twist;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= word << 7 & 0x9D2C_5680;
        word ^= word << 15 & 0xEFC6_0000;
        word ^ word >> 18
    }

    /// Brings a list into random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let bits = (i + 1).ilog2() + 1;
            let other = loop {
                let drawn = (self.next() >> (32 - bits)) as usize;
                if drawn <= i {
                    break drawn;
                }
            };
            list.swap(i, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_the_reference() {
        let mut list: Vec<u32> = (0..10).collect();
        Twister::new(42).shuffle(&mut list);
        assert_eq!(list, [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]);
    }

    #[test]
    fn words_are_those_of_the_reference_s_language() {
        let mut twister = Twister::new(0);
        assert_eq!([twister.next(), twister.next()], [3_626_764_237, 1_654_615_998]);
    }
}
