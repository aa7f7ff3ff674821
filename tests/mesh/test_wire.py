"""Bytes between devices, counted in XLA's text."""

from qlora_jax.mesh.wire import wire_bytes

TEXT = """
%body (p: (s32[], u8[64])) -> (s32[], u8[64]) {
  %g = (u8[64]{0}, f32[8]{0}) all-gather(%x, %y), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %s = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %d = f32[4]{0} reduce-scatter-done(%s)
  ROOT %t = (s32[], u8[64]{0}) tuple(%i, %d)
}

%sum (a: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%a), replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add
  %q = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%r), replica_groups={{0,1}}, to_apply=%add
  ROOT %z = f32[4]{0} all-reduce-done(%q)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], u8[64]{0}) while(%s), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[4]{0} call(%x), to_apply=%sum
  %a = (f32[2]{0}, f32[8]{0}) all-gather-start(%b), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %e = f32[8]{0} all-gather-done(%a)
}
"""


def test_what_a_device_receives_is_counted_with_the_turns_of_loops():
    assert wire_bytes(TEXT) == {
        "all-gather u8": 3 * 64 * 3 // 4,
        "all-gather f32": 3 * 32 * 3 // 4 + 32 * 3 // 4,
        "reduce-scatter f32": 3 * 64 * 3 // 4,
        "all-reduce f32": 2 * 16 * 7 // 8 + 2 * 16 // 2,
    }
