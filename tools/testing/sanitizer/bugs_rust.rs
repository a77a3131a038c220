// SPDX-License-Identifier: GPL-2.0-only

//! The bugs that need Rust code to be instrumented; see `bugs.c`.

use core::hint::black_box;
use kernel::prelude::*;

module! {
    type: Mistakes,
    name: "bugs_rust",
    authors: ["rksm"],
    description: "Mistakes in Rust that the sanitizer kernel must find",
    license: "GPL",
    params: {
        overflow: u8 {
            default: 0,
            description: "Add to this in a u8 instead of using freed memory",
        },
    },
}

struct Mistakes;

impl kernel::Module for Mistakes {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let overflow = module_parameters::overflow.value();
        if overflow > 0 {
            pr_info!("sum {}\n", black_box(u8::MAX) + overflow);
            return Ok(Mistakes);
        }

        let boxed = KBox::new(0u64, GFP_KERNEL)?;
        let freed: *const u64 = &*boxed;
        drop(boxed);
        // SAFETY: None; that it is found is what is tested.
        let value = unsafe { freed.read_volatile() };
        pr_info!("read {value}\n");
        Ok(Mistakes)
    }
}
