// SPDX-License-Identifier: GPL-2.0-only

//! The hash of a page's contents: NH, as in UMAC, on 64-bit words, under a secret random key.
//!
//! A key word is added to each word of the page, neighbours are multiplied, and the products are summed up, in 128 bits.
//! For any two contents that are chosen without knowledge of the key, the sums are equal with a probability of at most
//! 2⁻⁶⁴: so nobody can choose pages that collide, which no unkeyed mixing function could promise. Half the instructions
//! of `xxh64`, and no chain of dependent multiplications.
//!
//! Multiplying the halves of the sum with two further random numbers, each of 128 bits, and taking the upper half of
//! what that adds up to makes 64 bits of it, equal for different sums with a probability of 2⁻⁶⁴ (multiply-shift).

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Words of a page.
pub const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Words of a page that are added to the sums in one round of the loop.
const ROUND: usize = 8;

static_assert!(WORDS % ROUND == 0);

/// A random key. Where it comes from decides how good the hash is.
#[repr(transparent)]
pub struct ContentKey([u64; ContentKey::WORDS]);

impl ContentKey {
    /// Words of a key.
    pub const WORDS: usize = WORDS + 4;

    /// Makes a key of random words.
    pub const fn new(random: [u64; Self::WORDS]) -> Self {
        Self(random)
    }

    /// The key's words, to be made random.
    pub fn words_mut(&mut self) -> &mut [u64; Self::WORDS] {
        &mut self.0
    }

    /// Hashes the page of which `word` returns the words.
    ///
    /// Each word is asked for once: a page that changes meanwhile has the hash of some mixture of its contents.
    #[inline(always)]
    pub fn hash(&self, word: impl Fn(usize) -> u64) -> u64 {
        let (key, fold) = self.0.split_at(WORDS);
        // A sum for each pair of a round: one for all would cost two moves between registers a pair.
        let mut sums = [0u128; ROUND / 2];
        let mut at = 0;
        for round in key.chunks_exact(ROUND) {
            for (i, (pair, sum)) in round.chunks_exact(2).zip(&mut sums).enumerate() {
                let &[first, second] = pair else { continue };
                let first = word(at + 2 * i).wrapping_add(first);
                let second = word(at + 2 * i + 1).wrapping_add(second);
                *sum = sum.wrapping_add(u128::from(first) * u128::from(second));
            }
            at += ROUND;
        }
        let sum = sums.into_iter().fold(0, u128::wrapping_add);
        let (low, high) = (sum as u64, (sum >> 64) as u64);
        let &[a, b, c, d] = fold else { return low };
        let wide = |upper: u64, lower: u64| u128::from(upper) << 64 | u128::from(lower);
        let low = wide(a, b).wrapping_mul(u128::from(low));
        let high = wide(c, d).wrapping_mul(u128::from(high));
        (low.wrapping_add(high) >> 64) as u64
    }
}
