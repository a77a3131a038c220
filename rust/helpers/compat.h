/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Older kernels under the names of the newest that is supported, so that the helpers are written
 * for that. Its counterpart for Rust is rust/kernel_ext/compat.rs; nothing else asks for a version.
 */
#ifndef RKSM_COMPAT_H
#define RKSM_COMPAT_H

/* That of 7.2 needs swap.h, and does not include it. */
#include <linux/swap.h>
#include <linux/leafops.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
/* The bit has only one use there. */
#define pte_uffd(pte) pte_uffd_wp(pte)
#define pmd_uffd(pmd) pmd_uffd_wp(pmd)
/* A private mapping of a file has one index for its pages and its copies of them. */
#define linear_anon_page_index(vma, addr) linear_page_index(vma, addr)
#endif

#endif
