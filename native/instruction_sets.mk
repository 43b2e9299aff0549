# The compiler flags of each instruction set: isa.MACHINE.NAME. A source file whose name ends with `_NAME` is compiled
# with them, and for that machine only; every other file for the machine's baseline. The makefiles of tests and fuzz
# include this file; setup.py reads the lines that begin with `isa.`.

# Scalar is the oracle: one element at a time, as it is written.
isa.any.scalar := -fno-tree-vectorize -fno-tree-slp-vectorize
isa.x86_64.avx2 := -mavx2 -mfma
isa.x86_64.avx2aes := -mavx2 -maes
isa.x86_64.avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
isa.x86_64.avx512bf16 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mavx512bf16
isa.x86_64.avx512vnni := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mavx512vnni
isa.x86_64.avx512vaes := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -maes -mvaes
isa.x86_64.amx := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8

machine := $(patsubst amd64,x86_64,$(shell uname -m))
others := $(filter-out isa.any.% isa.$(machine).%,$(filter isa.%,$(.VARIABLES)))
other_sets := $(foreach name,$(others),$(lastword $(subst ., ,$(name))))
set_of = $(lastword $(subst _, ,$(basename $(notdir $1))))
# $(call isa_flags,source): its flags. $(call compilable,sources): those that are for this machine.
isa_flags = $(isa.any.$(set_of)) $(isa.$(machine).$(set_of))
compilable = $(foreach source,$1,$(if $(filter $(other_sets),$(call set_of,$(source))),,$(source)))
