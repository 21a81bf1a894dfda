"""Collectives read from HLO text, by hand: how often each runs, and what each device receives."""

import pytest

from qtjax.planning import collectives

# As GPUs and CPUs print it: a loop that says its turns, an asynchronous pair, a call, a reduction of a whole array.
PLAIN = """HloModule m

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = bf16[8,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%y), channel_id=2, replica_groups=[1,4]<=[4]
  %d = f32[32]{0} all-gather-done(%s)
}

%cond.1 (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner.1 (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), channel_id=3, to_apply=%add.1
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %s2 = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"32"}}
  %f = f32[4]{0} fusion(%q), kind=kLoop, calls=%inner.1
  %g = f32[4]{0} reduce-scatter(%q), channel_id=5, replica_groups=mesh['a'=2,'b'=2] {'b'}
  %p2 = (s8[16]{0}, s8[16]{0}, u32[], u32[]) collective-permute-start(%z), channel_id=4
}
"""


def test_plain_text():
    """32 turns: half of 2048 bytes among 2, 3/4 of 128 among 4; 3/4 of 16 bytes twice; half of the 32 bytes that scatter; 16 sent on."""
    assert collectives(PLAIN, 4) == [
        ("all-gather", 64, 32 * (1024 + 96)), ("all-reduce", 1, 24), ("collective-permute", 1, 16), ("reduce-scatter", 1, 16)
    ]  # fmt: skip


# As TPUs print it: turns are to be read off the counter; one gather begins before the loop, goes on in it and ends after it.
CHAINED = """HloModule m

%start (p: bf16[8]) -> (bf16[8], bf16[64]) {
  %g.1 = bf16[64]{0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (bf16[8], bf16[64]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (p: bf16[8]) -> bf16[64] {
  ROOT %g.2 = bf16[64]{0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %d = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}

%body (p: (u32[], f32[64], u32[])) -> (u32[], f32[64], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %m = u32[]{:T(128)} get-tuple-element(%p), index=2
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="a"}
  %x = f32[64]{0} fusion(%y), kind=kCustom, calls=%async_collective_fusion
  %z = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (u32[]{:T(128)}, f32[64]{0}, /*index=2*/u32[]{:T(128)}) tuple(%next, %x, /*index=2*/%m)
}

%cond (p: (u32[], f32[64], u32[])) -> pred[] {
  %limit = LIMIT
  %i.2 = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %limit), direction=LT, metadata={op_name="b"}
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %zero = u32[]{:T(128)} constant(0)
  %ten = u32[]{:T(128)} constant(10)
  %copied = u32[]{:T(128)} copy(%zero)
  %s = (bf16[8], bf16[64]) fusion(%p), kind=kCustom, calls=%start
  %init = (u32[]{:T(128)}, f32[64]{0}, /*index=2*/u32[]{:T(128)}) tuple(%copied, %p, /*index=2*/%ten)
  %w = (u32[]{:T(128)}, f32[64]{0}, /*index=2*/u32[]{:T(128)}) while(%init), condition=%cond, body=%body
  ROOT %e = bf16[64]{0} fusion(%s), kind=kCustom, calls=%async_collective_fusion
}
"""


@pytest.mark.parametrize("limit", ["u32[]{:T(128)} constant(10)", "u32[]{:T(128)} get-tuple-element(%p), index=2"])
def test_text_of_a_tpu(limit):
    """Ten in steps of two are 5 turns, wherever the limit stands; the gather counts once; what is reduced and sliced is scattered."""
    assert collectives(CHAINED.replace("LIMIT", limit), 8) == [("all-gather", 1, 112), ("reduce-scatter", 5, 5 * 224)]


def test_a_loop_that_only_the_program_ends_counts_once():
    """The limit is computed: no number of turns is made up."""
    assert collectives(CHAINED.replace("LIMIT", "u32[] multiply(%a, %b)"), 8)[1] == ("reduce-scatter", 1, 224)
