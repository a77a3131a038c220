// SPDX-License-Identifier: GPL-2.0-only

//! All that there is: processes, pages, stable nodes, and what is to go wrong.

use super::types::{
    Chance,
    Content,
    Event,
    Hash,
    Item,
    List,
    Node,
    Page,
    Purpose,
    Slab,
    Space, //
};
use engine_tests::engine::{
    stats::Merges,
    types::{
        ItemId,
        Refusal,
        Refusals, //
    }, //
};
use std::{
    cell::RefCell,
    collections::{
        BTreeMap,
        BTreeSet,
        VecDeque, //
    },
    rc::Rc, //
};

/// All that there is.
pub(crate) struct World {
    pub(crate) list: Rc<List>,
    pub(crate) hash: Hash,
    pub(crate) frames: BTreeMap<usize, Page>,
    pub(crate) offline: BTreeSet<usize>,
    pub(crate) spaces: BTreeMap<usize, Space>,
    pub(crate) nodes: Slab<Node>,
    pub(crate) items: Slab<Item>,
    pub(crate) zero_pages: i64,
    pub(crate) chance: Option<Chance>,
    /// Events that happen while the scanner runs, each after a number of its steps.
    pub(crate) interleaved: VecDeque<(u32, Event)>,
    /// The scan is to pause after so many pages.
    pub(crate) pause_after: Option<u32>,
    pub(crate) paused: bool,
    /// The knobs that the engine was given, to verify that it follows them.
    pub(crate) max_page_sharing: u32,
    pub(crate) merge_across_nodes: bool,
    pub(crate) use_zero_pages: bool,
    /// How often each refusal was given.
    pub(crate) refusals: Refusals,
    /// Every page that the engine has finished with.
    pub(crate) visits: Vec<(usize, usize)>,
    /// Addresses that may map a KSM page without an rmap item: there was no memory for one.
    pub(super) excused: BTreeSet<(usize, usize)>,
    /// How often a huge page was split, and the first page of a pair given its own page again.
    pub(crate) splits: u64,
    pub(crate) undone: u64,
    /// Items that the engine asked for, while it checks itself.
    pub(crate) asked: RefCell<Option<Vec<ItemId>>>,
    /// How often the engine could reschedule. It does so after each pass, and never between a walk
    /// and the decision to repeat it: this tells a batch that went through the pass from one that
    /// was discarded.
    pub(crate) passes: u64,
    /// Steps of all walks.
    pub(crate) steps: u64,
    /// Walks of all threads.
    pub(crate) walks: u64,
    /// TLB flushes.
    pub(crate) flushes: u64,
    /// Pages whose kind the engine has asked for since a walk collected them.
    pub(super) classified: BTreeSet<(usize, usize)>,
    /// What the walks are for that there are now.
    pub(crate) purpose: Purpose,
    /// What merges have done.
    pub(crate) merges: Merges,
    pub(super) next_key: usize,
    pub(super) next_huge: u32,
}

impl World {
    pub(crate) fn new(hash: Hash) -> Self {
        Self {
            list: Rc::new(List::new()),
            hash,
            frames: BTreeMap::new(),
            offline: BTreeSet::new(),
            spaces: BTreeMap::new(),
            nodes: Slab::new(),
            items: Slab::new(),
            zero_pages: 0,
            chance: None,
            interleaved: VecDeque::new(),
            pause_after: None,
            paused: false,
            max_page_sharing: 256,
            merge_across_nodes: true,
            use_zero_pages: false,
            refusals: Refusals::default(),
            visits: Vec::new(),
            excused: BTreeSet::new(),
            splits: 0,
            undone: 0,
            asked: RefCell::new(None),
            passes: 0,
            steps: 0,
            walks: 0,
            flushes: 0,
            classified: BTreeSet::new(),
            purpose: Purpose::Scan,
            merges: Merges::default(),
            next_key: 0xffff_0000,
            next_huge: 0,
        }
    }

    pub(crate) fn hash(&self, content: Content) -> u64 {
        let content = match self.hash {
            Hash::Good => content,
            Hash::Colliding => content % 3,
        };
        (u64::from(content) + 1).wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn roll(&mut self) -> Option<u64> {
        let chance = self.chance.as_mut()?;
        chance.seed = chance
            .seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let number = chance.seed >> 33;
        (number % chance.one_in == 0).then_some(number / chance.one_in)
    }

    /// Refuses at random.
    pub(super) fn may_refuse(&mut self, reasons: &[Refusal]) -> Result<(), Refusal> {
        match self.roll() {
            Some(number) => Err(reasons[number as usize % reasons.len()]),
            None => Ok(()),
        }
    }
}
