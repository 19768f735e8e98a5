"""The SGLang plugin; nothing outside this folder imports SGLang. See docs/sglang.md.

`plugin` is the entry point, `hooks` says where it takes hold and keeps every fault of ours inside, `attachment` is what it holds
on to in a scheduler process, `draft_policy` decides K by SGLang's own protocol, `step_book` matches steps with their results,
`confidences` and `stage_clock` are what they measure, `ranks` keeps tensor-parallel ranks at one K, `dspark` swaps SPS tables.
"""
