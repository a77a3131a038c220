// SPDX-License-Identifier: GPL-2.0-only
/*
 * What makes the unexported symbols of symbols_list.h usable. A function is called
 * through a static call, which is a direct call: an indirect one would fault on a CPU
 * with IBT, where the ENDBR of functions that nobody takes the address of is removed
 * at boot.
 */

#include <linux/kallsyms.h>
#include <linux/static_call.h>

#include "symbols.h"

#define F(ret, name, params, args)						\
	DEFINE_STATIC_CALL_NULL(rksm_call_##name, name);			\
	ret name params								\
	{									\
		return static_call(rksm_call_##name)args;			\
	}
#define D(type, name)								\
	static type *rksm_pointer_##name __ro_after_init;			\
	type *rksm_data_##name(void)						\
	{									\
		return rksm_pointer_##name;					\
	}
#include "symbols_list.h"
#undef F
#undef D

struct rksm_symbol {
	const char *name;
	struct static_call_key *key;	/* NULL for an object */
	void *where;			/* the trampoline, or the pointer to set */
};

static const struct rksm_symbol rksm_symbols[] = {
#define F(ret, name, params, args)						\
	{ #name, &STATIC_CALL_KEY(rksm_call_##name), STATIC_CALL_TRAMP_ADDR(rksm_call_##name) },
#define D(type, name) { #name, NULL, &rksm_pointer_##name },
#include "symbols_list.h"
#undef F
#undef D
};

size_t rksm_symbol_count(void)
{
	return ARRAY_SIZE(rksm_symbols);
}

const char *rksm_symbol_name(size_t i)
{
	return rksm_symbols[i].name;
}

void rksm_symbol_set(size_t i, unsigned long address)
{
	const struct rksm_symbol *symbol = &rksm_symbols[i];

	if (symbol->key)
		__static_call_update(symbol->key, symbol->where, (void *)address);
	else
		*(void **)symbol->where = (void *)address;
}

DEFINE_STATIC_CALL_NULL(rksm_call_on_each_match, kallsyms_on_each_match_symbol);

void rksm_kallsyms_set(unsigned long address)
{
	__static_call_update(&STATIC_CALL_KEY(rksm_call_on_each_match),
			     STATIC_CALL_TRAMP_ADDR(rksm_call_on_each_match), (void *)address);
}

int rksm_kallsyms_on_each_match_symbol(int (*fn)(void *, unsigned long), const char *name,
				       void *data)
{
	return static_call(rksm_call_on_each_match)(fn, name, data);
}
