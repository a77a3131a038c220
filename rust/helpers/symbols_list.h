/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every kernel symbol that rksm needs and that is not exported to modules. All are
 * looked up when the module loads; if one is missing, it does not load.
 *
 * Included by symbols.h and symbols.c with these defined:
 *
 *   F(return type, name, (parameters), (arguments))   a function
 *   D(type, name)                                     an object of that type
 *
 * A function is then there under its own name, so that the inlines and macros of the
 * kernel's headers work as they are. The address of an object is rksm_data_NAME().
 */

/* fs/sysfs, mm/mm_init.c, kernel/extable.c */
D(struct kobject *, mm_kobj)
F(int, core_kernel_text, (unsigned long addr), (addr))

/* kernel/bpf/btf.c */
F(const char *, btf_name_by_offset, (const struct btf *btf, u32 offset), (btf, offset))
F(void, btf_put, (struct btf *btf), (btf))

/* kernel/sched/core.c */
F(unsigned long long, task_sched_runtime, (struct task_struct *task), (task))

/* kernel/pid.c */
F(struct task_struct *, pidfd_get_task, (int pidfd, unsigned int *flags), (pidfd, flags))

/* mm/ksm.c */
F(int, ksm_enable_merge_any, (struct mm_struct *mm), (mm))
F(int, ksm_disable, (struct mm_struct *mm), (mm))
D(const struct attribute_group, ksm_attr_group)
D(unsigned long, ksm_run)
D(struct mutex, ksm_thread_mutex)
D(spinlock_t, ksm_mmlist_lock)
D(void, ksm_mm_head)
D(struct kmem_cache *, stable_node_cache)
D(struct kmem_cache *, rmap_item_cache)
D(struct rb_root *, root_stable_tree)
D(struct rb_root *, root_unstable_tree)
D(struct list_head, migrate_nodes)
D(unsigned long, ksm_pages_shared)
D(unsigned long, ksm_pages_sharing)
D(unsigned long, ksm_pages_unshared)
D(unsigned long, ksm_pages_scanned)
D(unsigned long, ksm_pages_skipped)
D(unsigned long, ksm_stable_node_chains)
D(unsigned long, ksm_stable_node_dups)
D(unsigned long, ksm_rmap_items)
D(atomic_long_t, ksm_zero_pages)
#ifdef CONFIG_NUMA
D(int, ksm_nr_node_ids)
#endif

/* include/trace/events/ksm.h; ksm_enter and ksm_exit go on firing in mm/ksm.c */
D(struct tracepoint, __tracepoint_ksm_start_scan)
D(struct tracepoint, __tracepoint_ksm_stop_scan)
D(struct tracepoint, __tracepoint_ksm_merge_one_page)
D(struct tracepoint, __tracepoint_ksm_merge_with_ksm_page)
D(struct tracepoint, __tracepoint_ksm_remove_ksm_page)
D(struct tracepoint, __tracepoint_ksm_remove_rmap_item)
D(struct tracepoint, __tracepoint_ksm_advisor)
F(int, __traceiter_ksm_start_scan, (void *data, int seq, u32 rmap_entries),
  (data, seq, rmap_entries))
F(int, __traceiter_ksm_stop_scan, (void *data, int seq, u32 rmap_entries),
  (data, seq, rmap_entries))
F(int, __traceiter_ksm_merge_one_page,
  (void *data, unsigned long pfn, void *rmap_item, void *mm, int err),
  (data, pfn, rmap_item, mm, err))
F(int, __traceiter_ksm_merge_with_ksm_page,
  (void *data, void *ksm_page, unsigned long pfn, void *rmap_item, void *mm, int err),
  (data, ksm_page, pfn, rmap_item, mm, err))
F(int, __traceiter_ksm_remove_ksm_page, (void *data, unsigned long pfn), (data, pfn))
F(int, __traceiter_ksm_remove_rmap_item,
  (void *data, unsigned long pfn, void *rmap_item, void *mm), (data, pfn, rmap_item, mm))
F(int, __traceiter_ksm_advisor,
  (void *data, s64 scan_time, unsigned long pages_to_scan, unsigned int cpu_percent),
  (data, scan_time, pages_to_scan, cpu_percent))

/* mm/huge_memory.c */
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
F(int, __split_huge_page_to_list_to_order,
  (struct page *page, struct list_head *list, unsigned int new_order),
  (page, list, new_order))
F(struct page *, vm_normal_page_pmd,
  (struct vm_area_struct *vma, unsigned long addr, pmd_t pmd), (vma, addr, pmd))
#endif

/* mm/vmscan.c, mm/folio.c; mm/internal.h declares them */
F(bool, folio_isolate_lru, (struct folio *folio), (folio))
F(void, folio_putback_lru, (struct folio *folio), (folio))

/* mm/memory.c */
F(struct page *, vm_normal_page, (struct vm_area_struct *vma, unsigned long addr, pte_t pte),
  (vma, addr, pte))
F(struct folio *, vm_normal_folio, (struct vm_area_struct *vma, unsigned long addr, pte_t pte),
  (vma, addr, pte))
F(void, mm_trace_rss_stat, (struct mm_struct *mm, int member), (mm, member))

/* mm/mmu_notifier.c */
F(int, __mmu_notifier_invalidate_range_start, (struct mmu_notifier_range *range), (range))
F(void, __mmu_notifier_invalidate_range_end, (struct mmu_notifier_range *range), (range))
#ifdef CONFIG_LOCKDEP
D(struct lockdep_map, __mmu_notifier_invalidate_range_start_map)
#endif
F(bool, __mmu_notifier_clear_young,
  (struct mm_struct *mm, unsigned long start, unsigned long end), (mm, start, end))
F(bool, __mmu_notifier_test_young, (struct mm_struct *mm, unsigned long address), (mm, address))

/* mm/page_vma_mapped.c, mm/pagewalk.c */
F(bool, page_vma_mapped_walk, (struct page_vma_mapped_walk *pvmw), (pvmw))
F(int, walk_page_range_vma,
  (struct vm_area_struct *vma, unsigned long start, unsigned long end,
   const struct mm_walk_ops *ops, void *private),
  (vma, start, end, ops, private))
F(struct folio *, folio_walk_start,
  (struct folio_walk *fw, struct vm_area_struct *vma, unsigned long addr,
   folio_walk_flags_t flags),
  (fw, vma, addr, flags))

F(void, vma_pgtable_walk_end, (struct vm_area_struct *vma), (vma))

/* mm/pgtable-generic.c, arch/x86/mm/pgtable.c, arch/x86/mm/tlb.c */
F(pte_t *, pte_offset_map_lock,
  (struct mm_struct *mm, pmd_t *pmd, unsigned long addr, spinlock_t **ptlp),
  (mm, pmd, addr, ptlp))
F(pte_t, ptep_clear_flush, (struct vm_area_struct *vma, unsigned long address, pte_t *ptep),
  (vma, address, ptep))
F(bool, ptep_test_and_clear_young,
  (struct vm_area_struct *vma, unsigned long addr, pte_t *ptep), (vma, addr, ptep))
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
F(bool, pmdp_test_and_clear_young,
  (struct vm_area_struct *vma, unsigned long addr, pmd_t *pmdp), (vma, addr, pmdp))
#endif
F(void, flush_tlb_mm_range,
  (struct mm_struct *mm, unsigned long start, unsigned long end, unsigned int stride_shift,
   bool freed_tables),
  (mm, start, end, stride_shift, freed_tables))

/* mm/rmap.c; mm/internal.h declares __put_anon_vma and mm_find_pmd */
F(void, __put_anon_vma, (struct anon_vma *anon_vma), (anon_vma))
F(pmd_t *, mm_find_pmd, (struct mm_struct *mm, unsigned long address), (mm, address))
F(unsigned long, page_address_in_vma,
  (const struct folio *folio, const struct page *page, const struct vm_area_struct *vma),
  (folio, page, vma))
F(void, folio_add_anon_rmap_ptes,
  (struct folio *folio, struct page *page, int nr_pages, struct vm_area_struct *vma,
   unsigned long address, rmap_t flags),
  (folio, page, nr_pages, vma, address, flags))
F(void, folio_remove_rmap_ptes,
  (struct folio *folio, struct page *page, int nr_pages, struct vm_area_struct *vma),
  (folio, page, nr_pages, vma))

/* mm/swap.c, mm/swapfile.c */
F(void, lru_add_drain_all, (void), ())
#ifdef CONFIG_SWAP
F(bool, folio_free_swap, (struct folio *folio), (folio))
#endif
