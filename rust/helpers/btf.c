// SPDX-License-Identifier: GPL-2.0-only

#include <linux/btf.h>

u32 rksm_btf_kind(const struct btf_type *type)
{
	return btf_kind(type);
}

u32 rksm_btf_vlen(const struct btf_type *type)
{
	return btf_vlen(type);
}

const struct btf_member *rksm_btf_member(const struct btf_type *type, u32 i)
{
	return &btf_type_member(type)[i];
}

u32 rksm_btf_member_bit_offset(const struct btf_type *type, const struct btf_member *member)
{
	return __btf_member_bit_offset(type, member);
}
