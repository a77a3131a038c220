// SPDX-License-Identifier: GPL-2.0-only

//! What happens, before a scan or between two of its steps.

use super::{
    types::{
        addr,
        area,
        Event,
        Mapping,
        Pte,
        AREAS,
        HUGE,
        PAGE, //
    },
    world::World, //
};

impl World {
    /// Lets an event happen.
    pub(crate) fn happen(&mut self, event: &Event) {
        let at = |page: usize, count: usize| (page..page + count).map(addr);
        match *event {
            Event::Spawn { mergeable } => {
                if self.live().count() < 8 {
                    let key = self.new_space(mergeable);
                    self.enter(key);
                }
            }
            Event::Write {
                mm,
                page,
                count,
                content,
                step,
            } => {
                let Some(key) = self.nth(mm) else { return };
                let mut content = content;
                for addr in at(page, count) {
                    self.write(key, addr, content);
                    content = content.wrapping_add(step);
                }
            }
            Event::Unmap { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    self.set_pte(key, addr, None);
                    self.space_mut(key).shadow.remove(&addr);
                }
            }
            Event::Move {
                mm,
                from,
                to,
                count,
            } => {
                let Some(key) = self.nth(mm) else { return };
                for (from, to) in at(from, count).zip(at(to, count)) {
                    // Only memory that is mergeable alike can be moved there.
                    let space = self.space(key);
                    let alike = space.mergeable[area(from)] == space.mergeable[area(to)];
                    let alike = alike && from != to;
                    if alike && space.ptes.get(&from) == Some(&Pte::Zero) {
                        self.unshare(key, from);
                    }
                    let space = self.space(key);
                    let Some(&pte) = space.ptes.get(&from).filter(|_| alike) else {
                        continue;
                    };
                    self.set_pte(key, to, Some(pte));
                    self.set_pte(key, from, None);
                    let shadow = &mut self.space_mut(key).shadow;
                    let content = shadow.remove(&from).unwrap();
                    shadow.insert(to, content);
                    let accessed = &mut self.space_mut(key).accessed;
                    if accessed.remove(&from) {
                        accessed.insert(to);
                    } else {
                        accessed.remove(&to);
                    }
                    // If this is the page being visited, the scanner has seen another one there.
                    self.excused.insert((key, to));
                }
            }
            Event::SwapOut { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    if self.free_to_change(key, addr).is_some() {
                        let content = self.read(key, addr).unwrap();
                        self.set_pte(key, addr, Some(Pte::Swap(content)));
                    }
                }
            }
            Event::Age { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    self.space_mut(key).accessed.remove(&addr);
                }
            }
            Event::Read { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    self.mark_accessed(key, addr);
                }
            }
            Event::Collapse { mm, page } => {
                let Some(key) = self.nth(mm) else { return };
                let start = addr(page) / (HUGE * PAGE) * (HUGE * PAGE);
                let frames: Option<Vec<usize>> = (start..start + HUGE * PAGE)
                    .step_by(PAGE)
                    .map(|addr| {
                        self.free_to_change(key, addr).filter(|frame| {
                            let page = self.page(*frame);
                            page.maps == 1 && page.mapping == Mapping::Anon
                        })
                    })
                    .collect();
                for frame in frames.into_iter().flatten() {
                    self.page_mut(frame).huge = Some(self.next_huge);
                }
                self.next_huge += 1;
            }
            Event::Fork { mm, dont_fork } => {
                let Some(key) = self.nth(mm).filter(|_| self.live().count() < 8) else {
                    return;
                };
                let parent = self.space(key);
                let (mergeable, mut shadow) = (parent.mergeable, parent.shadow.clone());
                let inherited = parent.zero_pages;
                let left_out = |addr: &usize| dont_fork.is_some_and(|n| area(*addr) == n);
                shadow.retain(|addr, _| !left_out(addr));
                let ptes = parent.ptes.iter().filter(|(addr, _)| !left_out(addr));
                let ptes: Vec<(usize, Pte)> = ptes.map(|(a, p)| (*a, *p)).collect();
                let child = self.new_space(mergeable);
                self.space_mut(child).shadow = shadow;
                for (addr, pte) in ptes {
                    match pte {
                        Pte::Page(frame) if self.page(frame).pinned => {
                            let content = self.page(frame).content;
                            let copy = self.alloc(content, 0);
                            self.set_pte(child, addr, Some(Pte::Page(copy)));
                        }
                        // The counter counts zero pages placed by KSM, and copies of their entries.
                        pte => self.set_pte(child, addr, Some(pte)),
                    }
                }
                // The core copies the count, and then copies the entries without counting.
                self.space_mut(child).zero_pages = inherited;
                self.enter(child);
            }
            Event::Miscount { mm, by } => {
                let Some(key) = self.nth(mm) else { return };
                self.space_mut(key).zero_pages += by;
            }
            Event::Exit { mm, steps } => {
                // An mm whose exit has begun is as likely as any other.
                let all: Vec<usize> = self
                    .spaces
                    .iter()
                    .filter(|(_, space)| space.live() || !space.ptes.is_empty() || !space.exited)
                    .map(|(key, _)| *key)
                    .collect();
                let Some(n) = mm.checked_rem(all.len()) else {
                    return;
                };
                for _ in 0..steps {
                    self.exit_step(all[n]);
                }
            }
            Event::Advise { mm, area, on } => {
                let Some(key) = self.nth(mm) else { return };
                let n = area % AREAS.len();
                if on {
                    self.space_mut(key).mergeable[n] = true;
                    self.enter(key);
                } else if self.space(key).mergeable[n] {
                    let (start, pages) = AREAS[n];
                    let _ = self.break_ksm(key, start..start + pages * PAGE, &mut None);
                    self.space_mut(key).mergeable[n] = false;
                }
            }
            Event::Migrate { mm, page, nid } => {
                let Some(key) = self.nth(mm) else { return };
                if let Some(frame) = self.free_to_change(key, addr(page)) {
                    self.migrate(frame, nid % 2);
                }
            }
            Event::Hold { mm, tries } => {
                if let Some(key) = self.nth(mm) {
                    self.space_mut(key).held = tries;
                }
            }
            Event::Lock { mm, page } | Event::Pin { mm, page } => {
                let Some(key) = self.nth(mm) else { return };
                if let Some(&Pte::Page(frame)) = self.space(key).ptes.get(&addr(page)) {
                    let page = self.page_mut(frame);
                    match event {
                        Event::Lock { .. } => page.locked = true,
                        // A pin for writing is preceded by a write, which gives a page of its own.
                        _ => page.pinned = page.mapping == Mapping::Anon && page.maps == 1,
                    }
                }
            }
            Event::Release => {
                for page in self.frames.values_mut() {
                    (page.locked, page.pinned) = (false, false);
                }
            }
        }
    }

    /// Counts a step of the scanner, and lets the events happen that are due.
    pub(crate) fn step(&mut self) {
        while let Some((after, _)) = self.interleaved.front_mut() {
            if *after > 0 {
                *after -= 1;
                return;
            }
            if let Some((_, event)) = self.interleaved.pop_front() {
                self.happen(&event);
            }
        }
    }
}
