//! NumPy's default random numbers, bit for bit: `SeedSequence`, PCG64 (XSL-RR 128/64), Lemire's
//! bounded integers and `Generator.choice` without replacement. Span corruption has to draw the
//! same spans as reference scripts do, or its loss is not comparable with theirs.

/// The generator behind `numpy.random.default_rng(seed)`.
#[derive(Debug, Clone)]
pub(super) struct Pcg64 {
    state: u128,
    increment: u128,
    /// The upper half of the last number, when only its lower half was used.
    half: Option<u32>,
}

const MULTIPLIER: u128 = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645;

impl Pcg64 {
    /// `numpy.random.default_rng(seed)`.
    pub(super) fn seeded(seed: u64) -> Self {
        let words = seed_words(seed);
        let wide = |i: usize| (u128::from(words[i]) << 64) | u128::from(words[i + 1]);
        let mut rng = Self { state: 0, increment: (wide(2) << 1) | 1, half: None };
        rng.step();
        rng.state = rng.state.wrapping_add(wide(0));
        rng.step();
        rng
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(half) = self.half.take() {
            return half;
        }
        let next = self.next_u64();
        self.half = Some((next >> 32) as u32);
        next as u32
    }

    /// A number from `0..=last`, each with the same probability.
    fn up_to(&mut self, last: u32) -> u32 {
        if last == 0 {
            return 0;
        }
        let Some(count) = last.checked_add(1) else { return self.next_u32() };
        let mut product = u64::from(self.next_u32()) * u64::from(count);
        if (product as u32) < count {
            let threshold = (u32::MAX - last) % count;
            while (product as u32) < threshold {
                product = u64::from(self.next_u32()) * u64::from(count);
            }
        }
        (product >> 32) as u32
    }

    /// `choice(n, k, replace=False)`: `k ≤ n ≤ 10,000` different numbers below `n`, by Floyd's
    /// algorithm and a shuffle.
    pub(super) fn choice(&mut self, n: u32, k: u32) -> Vec<u32> {
        let mut chosen: Vec<u32> = Vec::with_capacity(k as usize);
        for last in n.saturating_sub(k)..n {
            let drawn = self.up_to(last);
            chosen.push(if chosen.contains(&drawn) { last } else { drawn });
        }
        for i in (1..chosen.len()).rev() {
            let j = self.up_to(i as u32) as usize;
            chosen.swap(i, j);
        }
        chosen
    }
}

/// `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_words(seed: u64) -> [u64; 4] {
    let mut constant: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hash);
    for from in 0..4 {
        for to in (0..4).filter(|&to| to != from) {
            let other = hash(pool[from]);
            let mixed =
                pool[to].wrapping_mul(0xca01_f9dd).wrapping_sub(other.wrapping_mul(0x4973_f715));
            pool[to] = mixed ^ (mixed >> 16);
        }
    }
    let mut constant: u32 = 0x8b51_f9dd;
    let mut word = |i: usize| {
        let value = pool[i % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        u64::from(value ^ (value >> 16))
    };
    [0, 2, 4, 6].map(|i| word(i) | (word(i + 1) << 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_become_the_words_that_numpy_makes() {
        assert_eq!(
            seed_words(1234),
            [6882349382922872486, 11590492409849068143, 12133961332504294695, 7528486351679201682]
        );
        let mut rng = Pcg64::seeded(1234);
        assert_eq!(
            [rng.next_u64(), rng.next_u64(), rng.next_u64()],
            [18016930633132456890, 7013373421822782593, 17030886991259909300]
        );
    }

    #[test]
    fn choices_are_those_of_numpy() {
        let mut rng = Pcg64::seeded(5);
        assert_eq!(rng.choice(37, 12), [23, 0, 1, 15, 10, 36, 9, 33, 17, 21, 14, 20]);
        assert_eq!(rng.choice(217, 12), [84, 90, 180, 58, 204, 55, 24, 48, 136, 190, 169, 37]);
        assert_eq!(rng.choice(4, 4), [3, 1, 0, 2]);
        assert_eq!(Pcg64::seeded(1 << 40).choice(9_000, 6), [8957, 7140, 5652, 3415, 8297, 3245]);
    }
}
