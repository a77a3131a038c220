// SPDX-License-Identifier: GPL-2.0-only

//! The hash of a page's contents: NH on 64-bit words, under a secret random key.
//!
//! NH is the hash of UMAC (J. Black, S. Halevi, H. Krawczyk, T. Krovetz, P. Rogaway, "UMAC: Fast
//! and Secure Message Authentication", CRYPTO '99; RFC 4418). It adds a word of the key to each
//! word of the page, multiplies neighbours and sums up the products, in 128 bits. For any two
//! contents that are chosen without knowledge of the key, the sums are equal with a probability of
//! at most 2⁻⁶⁴. So an attacker cannot choose pages that collide, which no hash without a key could
//! promise. NH takes half the instructions of `xxh64` and has no chain of dependent
//! multiplications.
//!
//! Multiply-shift (M. Dietzfelbinger, "Universal Hashing and k-wise Independent Random Variables
//! via Integer Arithmetic without Primes", STACS '96) reduces the sum to 64 bits: its halves are
//! multiplied by two more random numbers of 128 bits each, and the upper half of the sum of these
//! products is the hash. Different sums have equal hashes with a probability of 2⁻⁶⁴.
//!
//! # Examples
//!
//! ```
//! use engine::content_hash::{ContentKey, WORDS};
//!
//! // A real key is random.
//! let key = ContentKey::new(core::array::from_fn(|i| (i as u64 + 1).pow(7)));
//! let page = [1u64; WORDS];
//! let mut other = page;
//! other[WORDS - 1] = 2;
//! assert_eq!(key.hash(|i| page[i]), key.hash(|_| 1));
//! assert_ne!(key.hash(|i| page[i]), key.hash(|i| other[i]));
//! ```

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Number of words in a page.
pub const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Number of words that one round of the loop adds to the sums.
const ROUND: usize = 8;

static_assert!(WORDS % ROUND == 0);

/// A key, which has to be random and secret for the hash to keep its promise.
#[repr(transparent)]
pub struct ContentKey([u64; ContentKey::WORDS]);

impl ContentKey {
    /// Number of words in a key: one for each word of a page, and two numbers of 128 bits.
    pub const WORDS: usize = WORDS + 4;

    /// Returns a key of these words, which have to be random.
    pub const fn new(random: [u64; Self::WORDS]) -> Self {
        Self(random)
    }

    /// Returns the words of the key, for the caller to fill with random numbers.
    pub fn words_mut(&mut self) -> &mut [u64; Self::WORDS] {
        &mut self.0
    }

    /// Hashes the page whose words `word` returns.
    ///
    /// Reads each word once: a page that changes meanwhile has the hash of a mixture of its old and
    /// new contents.
    #[inline(always)]
    pub fn hash(&self, word: impl Fn(usize) -> u64) -> u64 {
        let (key, fold) = self.0.split_at(WORDS);
        // One sum for each pair of a round: a single sum would cost two moves between registers for
        // each pair.
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
