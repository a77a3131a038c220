// SPDX-License-Identifier: GPL-2.0-only

//! Whether the running kernel's private structs look as those this module was compiled for.
//!
//! Stable nodes and rmap items are used by `mm/ksm.c` of the kernel and by us in turn, and we walk
//! its slots. The layouts come from the target's BTF at build time; [`check_layouts`] compares them
//! with the BTF of the kernel that runs.

use crate::{
    bindings::raw::{
        self,
        layout, //
    },
    kernel_ext::{
        compat,
        symbols::Symbols, //
    }, //
};
use core::{
    mem::offset_of,
    ptr, //
};
use kernel::prelude::*;

/// How deep anonymous structs and unions may nest.
const MAX_DEPTH: u32 = 8;

/// A struct as this module was compiled with it.
struct Layout {
    name: &'static CStr,
    size: usize,
    members: &'static [(&'static CStr, usize)],
    /// Those that not every kernel has in the same place.
    more: &'static [(&'static CStr, usize)],
}

macro_rules! layouts {
    (@more) => { &[] };
    (@more $more:expr) => { &$more };
    ($($name:literal $type:ident {
        $($member:literal => $($path:ident).+ $(+ $inner:ident: $($rest:ident).+)?),+ $(,)?
    } $(and $more:expr;)?)+) => {
        &[$(Layout {
            name: $name,
            size: size_of::<layout::$type>(),
            members: &[$((
                $member,
                offset_of!(layout::$type, $($path).+)
                    $(+ offset_of!(layout::$inner, $($rest).+))?
            )),+],
            more: layouts!(@more $($more)?),
        }),+]
    };
}

/// Every member that this module or `mm/ksm.c` uses in an object of the other. Of a struct in a
/// union, which begins where the union does, the place in that struct is added.
const LAYOUTS: &[Layout] = layouts! {
    c"ksm_stable_node" ksm_stable_node {
        c"node" => __bindgen_anon_1,
        c"head" => __bindgen_anon_1 + ksm_stable_node__bindgen_ty_1__bindgen_ty_1: head,
        c"hlist_dup" => __bindgen_anon_1
            + ksm_stable_node__bindgen_ty_1__bindgen_ty_1: __bindgen_anon_1.hlist_dup,
        c"list" => __bindgen_anon_1
            + ksm_stable_node__bindgen_ty_1__bindgen_ty_1: __bindgen_anon_1.list,
        c"hlist" => hlist,
        c"kpfn" => __bindgen_anon_2,
        c"chain_prune_time" => __bindgen_anon_2,
        c"rmap_hlist_len" => rmap_hlist_len,
        c"nid" => nid,
    }
    c"ksm_rmap_item" ksm_rmap_item {
        c"rmap_list" => rmap_list,
        c"anon_vma" => __bindgen_anon_1,
        c"mm" => mm,
        c"address" => address,
    } and [
        compat::ITEM_INDEX,
        (c"head", compat::ITEM_LINKS + offset_of!(compat::ItemLinks, head)),
        (c"hlist", compat::ITEM_LINKS + offset_of!(compat::ItemLinks, hlist)),
    ];
    c"mm_slot" mm_slot {
        c"hash" => hash,
        c"mm_node" => mm_node,
        c"mm" => mm,
    }
    c"ksm_mm_slot" ksm_mm_slot {
        c"slot" => slot,
        c"rmap_list" => rmap_list,
    }
    c"ksm_scan" ksm_scan {
        c"mm_slot" => mm_slot,
        c"seqnr" => seqnr,
    }
};

/// A struct in the running kernel's BTF.
///
/// # Invariants
///
/// `btf` holds a reference, and `ty` is one of its types, of kind struct or union.
struct Struct {
    btf: *mut raw::btf,
    ty: *const raw::btf_type,
    symbols: Symbols,
}

impl Struct {
    /// Finds the struct `name`.
    fn find(symbols: Symbols, name: &CStr) -> Option<Self> {
        let mut btf = ptr::null_mut();
        // SAFETY: `name` is a C string, and `btf` may be written to.
        let id =
            unsafe { raw::bpf_find_btf_id(name.as_char_ptr(), raw::BTF_KIND_STRUCT, &mut btf) };
        let id = u32::try_from(id).ok().filter(|&id| id != 0)?;
        // SAFETY: A positive id comes with a reference to the BTF that has it.
        let ty = unsafe { raw::btf_type_by_id(btf, id) };
        // INVARIANT: As just said; only structs were looked for.
        Some(Self { btf, ty, symbols })
    }

    fn size(&self) -> usize {
        // SAFETY: By the type invariant. A struct has a size, not a type, in this union.
        unsafe { (*self.ty).__bindgen_anon_1.size as usize }
    }

    /// The offset in bytes of the member `name`, also within anonymous members.
    fn offset_of(&self, name: &CStr) -> Option<usize> {
        // SAFETY: By the type invariant.
        let bits = unsafe { self.bit_offset_of(self.ty, name, MAX_DEPTH) }?;
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// # Safety
    ///
    /// `ty` is null, or a type of `self.btf`.
    unsafe fn bit_offset_of(
        &self,
        ty: *const raw::btf_type,
        name: &CStr,
        depth: u32,
    ) -> Option<usize> {
        if ty.is_null() || depth == 0 {
            return None;
        }
        // SAFETY: By the contract.
        let kind = unsafe { raw::rksm_btf_kind(ty) };
        if kind != raw::BTF_KIND_STRUCT && kind != raw::BTF_KIND_UNION {
            return None;
        }
        // SAFETY: `ty` is a struct or union of `self.btf`.
        for i in 0..unsafe { raw::rksm_btf_vlen(ty) } {
            // SAFETY: A struct or union has that many members.
            let (member, offset) = unsafe {
                let member = raw::rksm_btf_member(ty, i);
                (
                    &*member,
                    raw::rksm_btf_member_bit_offset(ty, member) as usize,
                )
            };
            if self.name(member.name_off) == Some(name) {
                return Some(offset);
            }
            if self
                .name(member.name_off)
                .is_none_or(|name| name.is_empty())
            {
                // SAFETY: `self` holds a reference to the BTF, and this is null or a type of it.
                let rest = unsafe {
                    let inner = raw::btf_type_by_id(self.btf, member.type_);
                    self.bit_offset_of(inner, name, depth - 1)
                };
                if let Some(rest) = rest {
                    return Some(offset + rest);
                }
            }
        }
        None
    }

    fn name(&self, offset: u32) -> Option<&CStr> {
        let _ = self.symbols;
        // SAFETY: The symbol is resolved, and `self` holds a reference to the BTF.
        let name = unsafe { raw::btf_name_by_offset(self.btf, offset) };
        // SAFETY: The BTF's strings end with a NUL, and live as long as it.
        (!name.is_null()).then(|| unsafe { CStr::from_char_ptr(name) })
    }
}

impl Drop for Struct {
    fn drop(&mut self) {
        // SAFETY: The symbol is resolved, and by the type invariant the reference is ours.
        unsafe { raw::btf_put(self.btf) };
    }
}

/// Proof that the layouts that this module was compiled with are those of the running kernel.
#[derive(Clone, Copy)]
pub(crate) struct Layouts(());

/// Compares the layouts that this module was compiled with to those of the running kernel.
///
/// # Context
///
/// May sleep.
///
/// # Errors
///
/// `EINVAL`, after one line in the log that says what differs.
pub(crate) fn check_layouts(symbols: Symbols) -> Result<Layouts> {
    for layout in LAYOUTS {
        let Some(found) = Struct::find(symbols, layout.name) else {
            pr_err!(
                "cannot load: no struct {} in this kernel's BTF\n",
                layout.name
            );
            return Err(EINVAL);
        };
        if found.size() != layout.size {
            pr_err!(
                "cannot load: struct {} has {} bytes in this kernel, built for {}\n",
                layout.name,
                found.size(),
                layout.size
            );
            return Err(EINVAL);
        }
        for &(name, offset) in [layout.members, layout.more].into_iter().flatten() {
            let there = found.offset_of(name);
            if there != Some(offset) {
                // A member that is not there is at no offset.
                pr_err!(
                    "cannot load: struct {}: {} is at {} in this kernel, built for {}\n",
                    layout.name,
                    name,
                    there.map_or(-1, |there| there as isize),
                    offset
                );
                return Err(EINVAL);
            }
        }
    }
    Ok(Layouts(()))
}
