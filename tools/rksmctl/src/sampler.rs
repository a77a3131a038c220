// SPDX-License-Identifier: GPL-2.0-only
//! Estimates what merging saves, of a part of the *contents*: equal pages are looked at together
//! or not at all, so that what is counted of them only has to be multiplied.
//!
//! A sample of pages could not do that: of a pair, one page in 64 finds both only once in 4096.
//!
//! Pages go by a hash of a piece at one offset, which is cheap to read. Where many pages have the
//! same piece, they would all be in or all be out; such pieces are found beforehand in a small
//! random sample of pages, and their pages go by all they hold. Contents that are heavy themselves,
//! zeroes first of all, are counted without sampling.

use std::collections::hash_map::{DefaultHasher, Entry, HashMap};
use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};

/// Bytes of each page that are read first.
pub const PIECE: usize = 256;
/// So many pages are read whole where there are as many: it keeps the error of a small set small.
pub const ENOUGH: u64 = 1 << 16;
/// One content of so many at least is read whole.
pub const RAREST: u64 = 64;
/// Pages of the random sample that finds the heavy contents.
pub const PILOT: u64 = 1 << 14;
/// What is found more often than once in so many pages of it is heavy.
const LIGHT: u64 = 2048;
/// Two standard deviations: 95 of 100 estimates are as near as that.
const BOUND: f64 = 2.0;

/// A generator of numbers (SplitMix64) that a seed repeats.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed that nobody can foresee; of 32 bits, so that it is easy to type.
    pub fn seed() -> u64 {
        RandomState::new().build_hasher().finish() >> 32
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(n)) >> 64) as u64
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the processes, as the caller counts them.
    pub process: usize,
    pub address: u64,
}

/// The memory behind a page. Pages that fork has left shared are one frame already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Its own, or nobody knows.
    Own,
    /// One that others map as well, by its number.
    Shared(u64),
    /// One that KSM has merged, by its number.
    Merged(u64),
}

/// How KSM is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// A merged page has so many mappings at most.
    pub max_page_sharing: u64,
    /// Pages of zeroes become mappings of the zero page, and need no page at all.
    pub use_zero_pages: bool,
}

/// Pages with the same content.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    /// What is in or out of the sample as a whole, and this with it; for the error.
    unit: u64,
    /// Frames that are not merged.
    own: u64,
    /// Mappings of merged frames, and those frames.
    merged: u64,
    frames: u64,
    /// Of the frames that are not merged: looked at twice, and changed in between.
    looked: u64,
    changed: u64,
    /// Counted in full, not sampled.
    exact: bool,
}

/// A page that is to be looked at again.
#[derive(Clone, Copy, Debug)]
struct Watched {
    place: Place,
    content: u64,
}

/// Takes pages, and knows in the end what merging saves.
pub struct Sampler {
    seed: u64,
    rate: u64,
    offset: usize,
    zero: u64,
    heavy_pieces: HashSet<u64>,
    heavy_contents: HashSet<u64>,
    groups: HashMap<u64, Group>,
    seen: HashSet<u64>,
    watched: Vec<Watched>,
}

/// The outcome, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// What is saved when all is merged, what is merged now included.
    pub possible: f64,
    /// Of the former, what the zero pages make.
    pub zero: f64,
    /// What is saved now.
    pub already: f64,
    /// The rest is within so much, 95 times out of 100.
    pub possible_error: f64,
    pub more_error: f64,
    /// Pages that have changed between the two looks, and are in none of the others.
    pub changing: f64,
}

impl Estimate {
    /// What merging would save more than is saved now.
    pub fn more(&self) -> f64 {
        (self.possible - self.already).max(0.0)
    }
}

impl Sampler {
    /// For `pages` pages. The same seed makes the same choices.
    pub fn new(seed: u64, pages: u64, page_size: usize) -> Self {
        let fits = (pages / ENOUGH).max(1);
        let rate = (1 << fits.ilog2()).min(RAREST);
        Self::with_rate(seed, rate, page_size)
    }

    /// Takes one content of `rate`.
    pub fn with_rate(seed: u64, rate: u64, page_size: usize) -> Self {
        let room = page_size.saturating_sub(PIECE) as u64;
        let mut sampler = Self {
            seed,
            rate: rate.max(1),
            offset: Random::new(seed).below(room + 1) as usize,
            zero: 0,
            heavy_pieces: HashSet::new(),
            heavy_contents: HashSet::new(),
            groups: HashMap::new(),
            seen: HashSet::new(),
            watched: Vec::new(),
        };
        let zeroes = vec![0; page_size];
        sampler.zero = sampler.hash(&zeroes);
        let piece = sampler.piece_of(&zeroes);
        sampler.heavy_pieces.insert(piece);
        sampler.heavy_contents.insert(sampler.zero);
        sampler
    }

    /// One content of so many is looked at.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Where the piece begins in each page.
    pub fn offset(&self) -> usize {
        self.offset
    }

    fn hash(&self, bytes: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        hasher.write(bytes);
        hasher.finish()
    }

    fn piece_of(&self, page: &[u8]) -> u64 {
        let end = (self.offset + PIECE).min(page.len());
        self.hash(page.get(self.offset..end).unwrap_or(page))
    }

    fn in_sample(&self, hash: u64) -> bool {
        hash % self.rate == 0
    }

    /// Learns from whole pages, picked at random, what is heavy. To be done before the first page
    /// is added; not needed where the rate is 1.
    pub fn pilot<'a>(&mut self, pages: impl Iterator<Item = &'a [u8]>) {
        let mut pieces: HashMap<u64, u64> = HashMap::new();
        let mut contents: HashMap<u64, u64> = HashMap::new();
        let mut n = 0;
        for page in pages {
            *pieces.entry(self.piece_of(page)).or_default() += 1;
            *contents.entry(self.hash(page)).or_default() += 1;
            n += 1;
        }
        let enough = (n / LIGHT).max(8);
        let heavy = |of: HashMap<u64, u64>| of.into_iter().filter(move |(_, c)| *c >= enough);
        self.heavy_pieces
            .extend(heavy(pieces).map(|(hash, _)| hash));
        self.heavy_contents
            .extend(heavy(contents).map(|(hash, _)| hash));
    }

    /// Whether a page with this piece is to be read whole.
    pub fn wants(&self, piece: &[u8]) -> bool {
        if self.rate == 1 {
            return true;
        }
        let hash = self.hash(piece);
        self.in_sample(hash) || self.heavy_pieces.contains(&hash)
    }

    /// Takes a page whose piece it wants.
    pub fn add(&mut self, place: Place, page: &[u8], frame: Frame) {
        let content = self.hash(page);
        let piece = self.piece_of(page);
        let exact = self.rate == 1 || self.heavy_contents.contains(&content);
        // Pages of a heavy piece go by all they hold.
        let unit = if exact || self.heavy_pieces.contains(&piece) {
            content
        } else {
            piece
        };
        if !exact && !self.in_sample(unit) {
            return;
        }
        let new = match frame {
            Frame::Own => true,
            Frame::Shared(number) | Frame::Merged(number) => self.seen.insert(number),
        };
        let group = self.groups.entry(content).or_insert(Group {
            unit,
            exact,
            ..Group::default()
        });
        if let Frame::Merged(_) = frame {
            group.merged += 1;
            group.frames += u64::from(new);
        } else if new {
            group.own += 1;
            // Of contents that are counted in full, so many as of the others are looked at again.
            let sampled = !exact || self.rate == 1;
            let of = ((place.process as u64) << 52) ^ place.address;
            if sampled || Random::new(self.seed ^ of).below(self.rate) == 0 {
                self.watched.push(Watched { place, content });
            }
        }
    }

    /// How many pages there are to look at again.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }

    /// Where they are, in the order in which they were added.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.watched.iter().map(|w| w.place)
    }

    /// The `index`th of them has been looked at again: what it holds now, or nothing if it is gone.
    pub fn again(&mut self, index: usize, page: Option<&[u8]>) {
        let Some(Watched { content, .. }) = self.watched.get(index).copied() else {
            return;
        };
        let changed = page.map(|page| self.hash(page)) != Some(content);
        if let Entry::Occupied(mut group) = self.groups.entry(content) {
            let group = group.get_mut();
            group.looked += 1;
            group.changed += u64::from(changed);
        }
    }

    /// What merging saves.
    pub fn estimate(&self, rules: Rules) -> Estimate {
        let rate = self.rate as f64;
        let mut sum = Estimate::default();
        // Of each unit, what its groups make together.
        let mut units: HashMap<u64, (f64, f64)> = HashMap::new();
        let mut second_look = 0.0;
        for (content, group) in &self.groups {
            let moving = ratio(group.changed, group.looked);
            let quiet = group.own as f64 * (1.0 - moving);
            let total = quiet + group.merged as f64;
            let needed = if *content == self.zero && rules.use_zero_pages {
                0.0
            } else {
                (total / rules.max_page_sharing.max(2) as f64).ceil()
            };
            let possible = (total - needed).max(0.0);
            let already = (group.merged - group.frames) as f64;
            let weight = if group.exact { 1.0 } else { rate };
            sum.possible += weight * possible;
            sum.already += weight * already;
            sum.changing += weight * group.own as f64 * moving;
            if *content == self.zero {
                sum.zero += possible;
            }
            if group.exact {
                // The part that changes is known of some of them only.
                let unseen = 1.0 - ratio(group.looked, group.own);
                let spread = moving * (1.0 - moving) / group.looked.max(1) as f64;
                second_look += (group.own as f64).powi(2) * spread * unseen;
            } else {
                let unit = units.entry(group.unit).or_default();
                unit.0 += possible;
                unit.1 += possible - already;
            }
        }
        // The variance of a sum of which each part is there or not: (1 - p) / p of the squares, of
        // which p are seen. One pair more than was found, as none found does not prove that there
        // is none.
        let error = |squares: f64| {
            let sampled = (1.0 - 1.0 / rate) * rate * rate * (squares + 1.0);
            BOUND * (sampled + second_look).sqrt()
        };
        sum.possible_error = error(units.values().map(|(g, _)| g * g).sum());
        sum.more_error = error(units.values().map(|(_, g)| g * g).sum());
        sum
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 512;
    const RULES: Rules = Rules {
        max_page_sharing: 1 << 40,
        use_zero_pages: false,
    };

    /// A page whose first half says only its kind, as headers and paddings do.
    fn page(kind: u64, content: u64) -> Vec<u8> {
        let mut random = Random::new(kind);
        let mut bytes: Vec<u8> = (0..SIZE / 16)
            .flat_map(|_| random.draw().to_le_bytes())
            .collect();
        let mut random = Random::new(content ^ 0xabcd);
        bytes.extend((0..SIZE / 16).flat_map(|_| random.draw().to_le_bytes()));
        bytes
    }

    /// What `memory` lists as (content, copies); pages with an even content have one piece in
    /// common where it lies in the first half.
    fn pages(memory: &[(u64, u64)]) -> Vec<Vec<u8>> {
        let bytes = |content: u64| match content {
            0 => vec![0; SIZE],
            c if c % 2 == 0 => page(7, c),
            c => page(c, c),
        };
        memory
            .iter()
            .flat_map(|(content, n)| vec![bytes(*content); *n as usize])
            .collect()
    }

    fn sample(seed: u64, rate: u64, all: &[Vec<u8>]) -> Estimate {
        let mut sampler = Sampler::with_rate(seed, rate, SIZE);
        let mut random = Random::new(!seed);
        let picked: Vec<&[u8]> = (0..2048)
            .map(|_| all[random.below(all.len() as u64) as usize].as_slice())
            .collect();
        sampler.pilot(picked.into_iter());
        let offset = sampler.offset();
        for (i, bytes) in all.iter().enumerate() {
            if sampler.wants(&bytes[offset..offset + PIECE]) {
                let place = Place {
                    process: 0,
                    address: i as u64 * SIZE as u64,
                };
                sampler.add(place, bytes, Frame::Own);
            }
        }
        sampler.estimate(RULES)
    }

    /// Over many seeds: the mean is the truth, and the claimed bound holds 9 times of 10.
    ///
    /// It holds 19 times of 20: so less than 9 of 10 in so many rounds, or a mean that is five
    /// standard errors off, has a chance of less than one in 100,000.
    #[track_caller]
    fn fair(name: &str, memory: &[(u64, u64)]) {
        const ROUNDS: u64 = 600;
        let first = Random::seed();
        println!("{name}: seeds {first}..{}", first + ROUNDS);
        let all = pages(memory);
        let truth = memory.iter().map(|(_, c)| c - 1).sum::<u64>() as f64;
        let (mut sum, mut squares, mut within) = (0.0, 0.0, 0);
        for seed in first..first + ROUNDS {
            let e = sample(seed, 8, &all);
            sum += e.possible;
            squares += e.possible * e.possible;
            within += u64::from((e.possible - truth).abs() <= e.possible_error);
        }
        let mean = sum / ROUNDS as f64;
        let deviation = ((squares / ROUNDS as f64 - mean * mean).max(0.0)).sqrt();
        let error = 5.0 * deviation / (ROUNDS as f64).sqrt() + 1e-6;
        println!("{name}: truth {truth}, mean {mean}, deviation {deviation}, within {within}");
        assert!((mean - truth).abs() <= error, "{name}: biased");
        assert!(within * 10 >= ROUNDS * 9, "{name}: the bound is too small");
    }

    #[test]
    fn pairs_and_singles() {
        let memory: Vec<(u64, u64)> = (1..2500).map(|c| (c, 1 + c % 2)).collect();
        fair("pairs of odd contents", &memory);
        let memory: Vec<(u64, u64)> = (1..2500).map(|c| (c, 2 - c % 2)).collect();
        fair("pairs with a piece in common", &memory);
        let memory: Vec<(u64, u64)> = (1..2500).map(|c| (c, 1)).collect();
        fair("no pairs", &memory);
    }

    #[test]
    fn many_sizes() {
        let mut random = Random::new(Random::seed());
        let memory: Vec<(u64, u64)> = (1..1500)
            .map(|c| (c, 1 + 20 / (1 + random.below(20))))
            .collect();
        fair("groups of many sizes", &memory);
    }

    /// Half of all pages are zero or one of three contents: the error stays small all the same.
    #[test]
    fn heavy_contents() {
        let mut memory: Vec<(u64, u64)> = (10..3000).map(|c| (c, 1 + c % 3)).collect();
        memory.extend([(0, 3000), (1, 1000), (2, 1000), (3, 1000)]);
        fair("heavy contents", &memory);
        let seed = Random::seed();
        println!("seed {seed}");
        let e = sample(seed, 8, &pages(&memory));
        assert_eq!(e.zero, 2999.0);
        assert!(e.possible_error < 0.12 * e.possible, "{e:?}");
    }

    #[test]
    fn everything_where_the_rate_is_one() {
        let memory = [(0, 5), (1, 3), (2, 2), (3, 1)];
        let e = sample(1, 1, &pages(&memory));
        assert_eq!((e.possible, e.possible_error, e.zero), (7.0, 0.0, 4.0));
        let rate = |pages| Sampler::new(1, pages, 4096).rate();
        assert_eq!(rate(0), 1);
        assert_eq!(rate(ENOUGH), 1);
        assert_eq!(rate(5 * ENOUGH), 4);
        assert_eq!(rate(1 << 40), RAREST);
    }

    fn add(sampler: &mut Sampler, content: u64, n: u64, frame: impl Fn(u64) -> Frame) {
        for i in 0..n {
            let place = Place {
                process: 0,
                address: i,
            };
            sampler.add(place, &page(content, content), frame(i));
        }
    }

    #[test]
    fn merged_and_shared_frames() {
        let mut sampler = Sampler::with_rate(1, 1, SIZE);
        // Four mappings of two merged pages, three of one frame that fork left, one more.
        add(&mut sampler, 1, 4, |i| Frame::Merged(100 + i / 2));
        add(&mut sampler, 1, 3, |_| Frame::Shared(7));
        add(&mut sampler, 1, 1, |_| Frame::Own);
        let e = sampler.estimate(RULES);
        assert_eq!((e.possible, e.already, e.more()), (5.0, 2.0, 3.0));
        let few = Rules {
            max_page_sharing: 2,
            ..RULES
        };
        assert_eq!(sampler.estimate(few).possible, 3.0);
    }

    #[test]
    fn zero_pages() {
        let mut sampler = Sampler::with_rate(1, 64, SIZE);
        for address in 0..100 {
            let place = Place {
                process: 0,
                address,
            };
            assert!(sampler.wants(&[0; PIECE]));
            sampler.add(place, &[0; SIZE], Frame::Own);
        }
        assert_eq!(sampler.estimate(RULES).possible, 99.0);
        let none = Rules {
            use_zero_pages: true,
            ..RULES
        };
        assert_eq!(sampler.estimate(none).zero, 100.0);
    }

    #[test]
    fn what_changes_is_left_out() {
        let mut sampler = Sampler::with_rate(1, 1, SIZE);
        add(&mut sampler, 1, 4, |_| Frame::Own);
        add(&mut sampler, 2, 2, |_| Frame::Own);
        assert_eq!(sampler.watched(), 6);
        for i in 0..6 {
            let now = match i {
                0 => None,
                1 => Some(page(9, 9)),
                4.. => Some(page(2, 2)),
                _ => Some(page(1, 1)),
            };
            sampler.again(i, now.as_deref());
        }
        sampler.again(6, None);
        let e = sampler.estimate(RULES);
        assert_eq!((e.possible, e.changing), (2.0, 2.0));
    }

    /// Of what is counted in full, a part is looked at again, and speaks for the rest.
    #[test]
    fn heavy_contents_that_change() {
        let mut sampler = Sampler::with_rate(3, 8, SIZE);
        for address in 0..4000 {
            let place = Place {
                process: 0,
                address,
            };
            sampler.add(place, &[0; SIZE], Frame::Own);
        }
        let n = sampler.watched();
        assert!((400..600).contains(&n), "{n}");
        for i in 0..n {
            sampler.again(i, (i % 4 != 0).then_some(&[0; SIZE]));
        }
        let e = sampler.estimate(RULES);
        assert!((e.changing - 1000.0).abs() < 20.0, "{e:?}");
        assert!((e.possible + e.changing - 3999.0).abs() < 2.0, "{e:?}");
        assert!(e.possible_error > 0.0);
    }
}
